"""Which of our metrics can anybody's script use? Metrics of Hugging Face's `evaluate`, each a file of its own.

`evaluate.load(f"{METRICS}/bits_per_byte.py")` or `from chatmodel.evaluation.metrics.bits_per_byte import BitsPerByte`;
nothing is fetched. Their inputs have different names, so that one `evaluate.combine` can hold all of them.
"""

from pathlib import Path

METRICS = Path(__file__).parent
