"""Judges of responses behind one small protocol, and pairs out of what they judged.

judges.py        the protocol, and what is judged
making.py        a recipe's `Judge` → the judge
function.py, classifier.py (loading.py), implicit.py, reward_model.py, endpoint/: the judges
conversations.py, identity.py: what those that are models share
files.py         a samples file → a judged file, resumable
labelled.py      how often a judge agrees with labelled pairs
pairing.py       judged responses → a pair; pairs_file.py: a judged file → a preference file
guard.py         whether the judge is being fooled
"""

from lora_dpo.judging.files import Judged, judge_file, read_samples
from lora_dpo.judging.function import FunctionJudge
from lora_dpo.judging.implicit import ImplicitJudge
from lora_dpo.judging.judges import Candidates, JudgeProtocol, tag
from lora_dpo.judging.labelled import Agreement, judge_pairs
from lora_dpo.judging.making import judge_on, make_judge
from lora_dpo.judging.pairing import Pair, Response, pair
from lora_dpo.judging.pairs_file import NoPairsError, Paired, pair_file

__all__ = [
    "Agreement",
    "Candidates",
    "FunctionJudge",
    "ImplicitJudge",
    "JudgeProtocol",
    "Judged",
    "NoPairsError",
    "Pair",
    "Paired",
    "Response",
    "judge_file",
    "judge_on",
    "judge_pairs",
    "make_judge",
    "pair",
    "pair_file",
    "read_samples",
    "tag",
]
