"""Conformance: what every method and every model family must keep, yours too.

    from editkit import testing

    def test_my_method():
        testing.check_method("nudge", NudgeSettings(layer=1)).require()

    def test_my_family():
        testing.check_family(my_tiny_model, my_tokenizer).require()

The checks run on tiny random models (tiny.py) in seconds, on a CPU, without a download.
"""

from editkit.testing.conformance import Conformance, Finding
from editkit.testing.of_family import check_family
from editkit.testing.of_method import check_method
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import untouched

__all__ = ["SITES", "Conformance", "Finding", "check_family", "check_method", "tiny_lm", "untouched"]
