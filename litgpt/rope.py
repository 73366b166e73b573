"""Rotary position embedding: RoFormer, arXiv 2104.09864, in the half-split form of GPT-NeoX and Llama.

n is `rope_n_elem`, T positions, h the head size. Without scaling theta_j = base^(-2j/n) for the pairs j = 0 ... n/2-1, and pair j of
position p is rotated by the angle p theta_j. `rope_adjustments` changes theta, by the kind (`Config.rope_kind`):

    linear    theta_j / factor
    llama3    waves longer than original_max_seq_len / low_freq_factor are slowed by `factor`, those shorter than
              original_max_seq_len / high_freq_factor stay, in between the two are mixed linearly in the frequency
    yarn      arXiv 2309.00071: pairs that turn more than beta_fast times over original_max_seq_len stay, those that turn less than
              beta_slow times are slowed by `factor`, in between the two are mixed linearly in j
    longrope  arXiv 2402.13753: theta_j / short_factor_j, or / long_factor_j where the sequence is longer than original_max_seq_len

YaRN and LongRoPE also multiply cos and sin by `attention_factor`. `rope_condense_ratio` divides theta. The order of the operations is
transformers', to the last bit: at position 93,000 one unit in the last place of theta changes the angle by 0.005.
"""

import math

import torch

from litgpt.config import Config

FIRST_SIZE = 2048  # positions of a new table: one that grows with every length makes torch.compile compile again


def frequencies(config: Config, long: bool = False) -> torch.Tensor:
    """Return theta with its scaling, fp32, (n/2,), with LongRoPE's `long` or short factors."""
    powers, kind, scaling = _powers(config, config.rope_base), config.rope_kind, config.rope_adjustments
    theta = 1 / powers
    if kind is None or scaling is None:
        return theta / config.rope_condense_ratio
    if kind == "longrope":
        return 1 / (torch.tensor(scaling["long_factor" if long else "short_factor"], dtype=torch.float32) * powers)
    slow = theta / scaling["factor"]
    if kind == "linear":
        return slow
    if kind == "yarn":
        keep = _yarn_share(config, scaling)
        return 1 / (scaling["factor"] * powers) * (1 - keep) + theta * keep
    low, high, length = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["original_max_seq_len"]
    wave = 2 * math.pi / theta
    keep = (length / wave - low) / (high - low)
    mixed = (1 - keep) * theta / scaling["factor"] + keep * theta
    return torch.where(wave > length / low, slow, torch.where(wave < length / high, theta, mixed))


def plain_frequencies(config: Config, base: float) -> torch.Tensor:
    """Return theta_j = base^(-2j/n), fp32, (n/2,)."""
    return 1 / _powers(config, base)


def _powers(config: Config, base: float) -> torch.Tensor:
    """Return base^(2j/n), fp32, (n/2,)."""
    n = config.rope_n_elem
    return base ** (torch.arange(0, n, 2, dtype=torch.float32) / n)


def _yarn_share(config: Config, scaling: dict[str, float]) -> torch.Tensor:
    """Return the share of each pair's own frequency that YaRN keeps, (n/2,): 1 up to the pair that turns beta_fast times, 0 from the one
    that turns beta_slow times.

    The two ends are rounded outward to whole pairs unless `truncate` is false.
    """
    n, base, length = config.rope_n_elem, config.rope_base, scaling["original_max_seq_len"]
    first, last = (n * math.log(length / (scaling[key] * 2 * math.pi)) / (2 * math.log(base)) for key in ("beta_fast", "beta_slow"))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, n - 1)
    return 1 - ((torch.arange(n // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)).clamp(0, 1)


def is_long(config: Config, length: int) -> bool:
    """Return True if LongRoPE uses its long factors for a sequence of `length` tokens."""
    return config.rope_kind == "longrope" and length > (config.rope_adjustments or {})["original_max_seq_len"]


class RotaryTable:
    """cos and sin of position * frequency as `rotate` takes them, computed once per device and extended on demand. Not a module:
    checkpoints do not hold it.

    A `local` table has `rope_local_base_freq` and no scaling.
    """

    def __init__(self, config: Config, local: bool = False) -> None:
        self.config, self.local = config, local
        self._tables: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, length: int, device: torch.device, long: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin for the positions 0 ... length-1, fp32, (length, n) each, with LongRoPE's `long` or short factors."""
        cos, sin = self._tables.get(long) or (torch.empty(0, 0),) * 2
        if cos.size(0) < length or cos.device != device:
            size = max(length, min(max(2 * cos.size(0), FIRST_SIZE), self.config.block_size))
            with torch.inference_mode(False):  # a table made while generating must serve training too
                cos, sin = (table.to(device) for table in self._make(size, long))
            self._tables[long] = cos, sin
        return cos[:length], sin[:length]

    def _make(self, size: int, long: bool) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        if self.local:
            assert config.rope_local_base_freq is not None
            each, factor = plain_frequencies(config, config.rope_local_base_freq), 1.0
        else:
            each, factor = frequencies(config, long), (config.rope_adjustments or {}).get("attention_factor", 1.0)
        angles = torch.outer(torch.arange(size, dtype=torch.float32), each)
        cos, sin = angles.cos() * factor, angles.sin() * factor  # (length, n/2)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first n dimensions of x (..., T, h) by the angles of (cos, cos) and (-sin, sin), (..., T, n). The others stay."""
    n = cos.size(-1)
    turned, rest = (x, None) if n == x.size(-1) else x.split((n, x.size(-1) - n), dim=-1)
    turned = turned * cos + turned.roll(n // 2, -1) * sin
    return turned if rest is None else torch.cat((turned, rest), dim=-1)
