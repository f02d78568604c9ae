"""Control strings where a normalizer or a token's own flags have a say in what is matched."""

from __future__ import annotations

import unicodedata

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from lora_dpo.preferences import Demonstration, Where
from lora_dpo.tokenization import ChatTokenizer

HERE = Where("chats.jsonl", 1)


def normalizing(normalizer, **flags) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose control strings are matched after its normalizer has seen the text."""
    backend = Tokenizer(models.BPE(vocab={chr(c): n for n, c in enumerate(range(33, 127))}, merges=[]))
    backend.normalizer = normalizer
    control = [AddedToken(text, normalized=True, **flags) for text in ("<s>", "</s>", "<call>")]
    backend.add_special_tokens(control[:2])
    backend.add_tokens(control[2:])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


ENDED = "{% for m in messages %}{{ '<s>' + m.role + ':' + m.content + '</s>' }}{% endfor %}"


@pytest.mark.parametrize("content", ["</S>", "\uff1c/s\uff1e", "a<S>b</s>", "</s", "x"])
def test_a_normalizer_makes_no_control_token_of_content(content):
    tokenizer = normalizing(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    branches = ChatTokenizer(tokenizer, ENDED, 1000).branches(Demonstration((turns[0],), (turns[1],), HERE))
    start, end = (tokenizer.get_vocab()[text] for text in ("<s>", "</s>"))
    assert [i for i in branches.side(0).tolist() if i in (start, end)] == [start, end] * 2
    said = "".join(tokenizer.convert_ids_to_tokens(branches.side(0)[branches.scored[0]].tolist()))
    assert said == unicodedata.normalize("NFKC", content).lower() + "</s>"


def test_a_control_string_the_tokenizer_itself_reads_as_text_stays_text():
    """`single_word` tokens are matched between non-words only: here not in "x<call>x"."""
    tokenizer = normalizing(None, single_word=True)
    template = "{{ 'x<call>x <call> ' }}" + ENDED.replace("'<s>' +", "' <s> ' +").replace(
        " '</s>'", " ' </s> '"
    )
    call, end = (tokenizer.get_vocab()[text] for text in ("<call>", "</s>"))
    for content, ends in (("hi", 2), ("hi </s> there", 2)):
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "hi"}]
        ids = (
            ChatTokenizer(tokenizer, template, 1000)
            .branches(Demonstration((turns[0],), (turns[1],), HERE))
            .side(0)
            .tolist()
        )
        assert (ids.count(call), ids.count(end)) == (1, ends)
