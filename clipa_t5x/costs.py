"""From FLOPs to chip-hours and money, at a stated share of a chip's peak."""

import dataclasses

from clipa_t5x import published, topologies
from clipa_t5x.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
      name: as in `CHIPS`.
      peak: dense bfloat16 FLOP/s, by its maker.
      price: US dollars for an hour of one chip, or None where none is taken for granted.
    """

    name: str
    peak: float
    price: float | None = None


def _peak(kind: str) -> float:
    peak = topologies.KINDS[kind].peak_flops
    assert peak is not None
    return peak


# Prices of clouds differ by place, month and contract; the one here is that of CLIPA-v2's table.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100-80G", _peak("gpu-a100"), published.A100_80G_PRICE),
        Chip("H100", _peak("gpu-h100")),
        Chip("H200", _peak("gpu-h200")),
        *(Chip(name, _peak(name)) for name in ("v4", "v5e", "v5p", "v6e", "tpu7x")),
    )
}
DEFAULT_CHIP = "A100-80G"

# What the published hours come to, see `python -m clipa_t5x.plan --published`.
DEFAULT_MFU = 0.25


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast and how dear a chip computes.

    Attributes:
      chip: the chip; its price is the one in force.
      mfu: model FLOPs utilisation, the share of the peak that model FLOPs get, in (0, 1].
    """

    chip: Chip
    mfu: float

    def hours(self, flops: float) -> float:
        """Chip-hours for that many FLOPs."""
        return flops / (self.chip.peak * self.mfu * 3600)

    def flops(self, hours: float) -> float:
        """FLOPs in that many chip-hours."""
        return hours * self.chip.peak * self.mfu * 3600

    def dollars(self, flops: float) -> float | None:
        """Cost of that many FLOPs, or None without a price."""
        return None if self.chip.price is None else self.hours(flops) * self.chip.price

    def budget_flops(self, hours: float | None, dollars: float | None) -> float:
        """FLOPs that a budget buys.

        Args:
          hours: of one chip, or None.
          dollars: or None; one of the two is given.

        Raises:
          UserError: both are given, one is not positive, or there is no price.
        """
        if hours is not None and dollars is not None:
            raise UserError(
                f"the budget is given twice, as --budget_hours={hours:g} and "
                f"--budget_dollars={dollars:g}: give one."
            )
        name, value = ("hours", hours) if hours is not None else ("dollars", dollars)
        if value is None or not 0 < value < float("inf"):
            raise UserError(f"--budget_{name} is {value}; it must be a positive number.")
        if hours is not None:
            return self.flops(hours)
        if self.chip.price is None:
            raise UserError(
                f"--budget_dollars={dollars:g} on {self.chip.name} needs --price, dollars for an "
                "hour of one chip: only that of A100-80G has a default."
            )
        return self.flops(value / self.chip.price)

    def __str__(self) -> str:
        """One line: chip, peak, MFU and price."""
        price = "no price (--price)"
        if self.chip.price is not None:
            price = f"${self.chip.price:g} per chip-hour"
        peak = f"{self.chip.peak / 1e12:g} TFLOP/s bfloat16 peak"
        return f"{self.chip.name}, {peak}, {self.mfu:.3g} MFU, {price}"


def rate(chip: str, mfu: float, price: float | None) -> Rate:
    """The rate of a chip of that name.

    Args:
      chip: a name in `CHIPS`, in any case.
      mfu: in (0, 1].
      price: dollars for an hour of one chip; None for the chip's default.

    Raises:
      UserError: an unknown chip, an mfu outside (0, 1], or a negative price.
    """
    by_name = {name.lower(): chip for name, chip in CHIPS.items()}
    if chip.lower() not in by_name:
        raise UserError(f"--chip is {chip!r}; it must be one of {', '.join(CHIPS)}.")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu:g}; it is a share of the peak: in (0, 1], as in 0.25.")
    if price is not None and not 0 < price < float("inf"):
        raise UserError(f"--price is {price:g}; it must be a positive number of dollars.")
    found = by_name[chip.lower()]
    return Rate(found if price is None else dataclasses.replace(found, price=price), mfu)
