"""Numbers to compare with."""

import logging
from typing import Any

import jax
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


def compilations(call) -> list[str]:
    """What XLA compiles while ``call`` runs."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("jax").addHandler(handler)
    try:
        with jax.log_compiles():
            call()
    finally:
        logging.getLogger("jax").removeHandler(handler)
    return [r.getMessage() for r in records if "Finished XLA compilation" in r.getMessage()]
