"""Helpers that several tests share."""

from typing import Any

SD15: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.015, "num_train_timesteps": 500},
    "scaled_linear": SD15,
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": [0.001 * (i + 1) for i in range(40)], "num_train_timesteps": 40},
    "zero terminal SNR": SD15 | {"rescale_betas_zero_snr": True},
    "linear, zero terminal SNR": {"rescale_betas_zero_snr": True},
}
