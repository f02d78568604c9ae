"""Which way of running a micro-batch is right for an architecture, found out on a small copy of it."""

from lora_dpo.probe.small import without_noise
from lora_dpo.probe.verdict import ASSUMED, TOLERANCE, Verdict, judge, probe

__all__ = ["ASSUMED", "TOLERANCE", "Verdict", "judge", "probe", "without_noise"]
