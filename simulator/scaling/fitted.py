"""Where a law was fitted, and what happens to a query outside.

A loss law is a curve through training runs. Outside their range it is a guess, and the published laws disagree by far: the
optimum of one budget moves from 2.6 to 157 tokens per parameter with the compute range of the runs that are fitted
(Besiroglu et al. 2024). So a query outside is refused unless extrapolation is asked for, and its answer is marked.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from simulator.errors import InputError

Range = tuple[float, float]


@dataclass(frozen=True)
class FittedRange:
    """Smallest and largest of the runs behind a law; None where the source does not say.

    Attributes
    ----------
    parameters
        parameters, counted as the law counts them.
    tokens
        training tokens.
    flops
        training compute. [FLOP]
    tokens_per_parameter
        D/N.
    """

    parameters: Range | None = None
    tokens: Range | None = None
    flops: Range | None = None
    tokens_per_parameter: Range | None = None

    def violations(self, **values: float) -> tuple[str, ...]:
        """Say which of the values, named as the attributes, lie outside.

        >>> FittedRange(parameters=(4e7, 1.6e10)).violations(parameters=7e10)
        ('parameters = 7e+10, fitted from 4e+07 to 1.6e+10',)
        """
        found = []
        for name, value in values.items():
            limits: Range | None = getattr(self, name)
            # A law's own optimum at the edge of its range is not an extrapolation for a rounding error.
            if limits is not None and not limits[0] * (1 - 1e-9) <= value <= limits[1] * (1 + 1e-9):
                found.append(f"{name} = {value:.4g}, fitted from {limits[0]:.4g} to {limits[1]:.4g}")
        return tuple(found)

    def require(self, law: str, values: Mapping[str, float], *, extrapolate: bool) -> tuple[str, ...]:
        """Return the violations, if extrapolation was asked for.

        Raises
        ------
        InputError
            If a value lies outside and extrapolation was not asked for, or is not a positive number.
        """
        for name, value in values.items():
            if not 0 < value < float("inf"):
                raise InputError(f"scaling law {law}: {name} = {value}: must be positive and finite")
        found = self.violations(**values)
        if found and not extrapolate:
            raise InputError(
                f"scaling law {law}: {'; '.join(found)}. Ask for extrapolation to have an answer all the same"
            )
        return found
