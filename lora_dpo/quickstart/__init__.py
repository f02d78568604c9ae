"""The embedded default: a base, preferences with a rule that can judge answers, and a tour through the
library.

No network, no GPU, nothing downloaded: everything is made here from a seed.
"""

from lora_dpo.quickstart.base import BaseSettings, cache_folder, quickstart_base, quickstart_data
from lora_dpo.quickstart.data import satisfies
from lora_dpo.quickstart.tour import tour

__all__ = ["BaseSettings", "cache_folder", "quickstart_base", "quickstart_data", "satisfies", "tour"]
