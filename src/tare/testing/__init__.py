"""What any method is checked with: recorded bases, oracles, invariants."""

from tare.testing.recorded import RecordedBasis

__all__ = ["RecordedBasis"]
