"""Numbers to compare with."""

from typing import Any

import numpy as np

import jaxmerge as jm


def delta64(lora: jm.LoRA) -> np.ndarray:
    """scale·B·A in float64 NumPy."""
    return float(lora.scale) * np.asarray(lora.b, np.float64) @ np.asarray(lora.a, np.float64)


def relative_error(value: Any, reference: Any) -> float:
    """‖value − reference‖ / ‖reference‖ in Frobenius norm."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
