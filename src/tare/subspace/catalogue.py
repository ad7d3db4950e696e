"""The bases by name: what `basis="..."` means in every method's constructor."""

from collections.abc import Callable

from tare.core.checks import check_choice
from tare.subspace.bases import Basis, GaussianBasis, GramBasis, OrthonormalBasis, RandomizedBasis, SVDBasis
from tare.subspace.coordinates import CoordinateBasis, EntryBasis
from tare.subspace.dct import DCTBasis
from tare.subspace.online import OnlineBasis

BASES: dict[str, Callable[[int | float], Basis]] = {
    "svd": SVDBasis,
    "svd-legacy": lambda rank: SVDBasis(rank, zero="legacy"),
    "gram": GramBasis,
    "randomized": RandomizedBasis,
    "gaussian": GaussianBasis,
    "orthonormal": OrthonormalBasis,
    "dct": DCTBasis,
    "online": OnlineBasis,
    "columns": lambda rank: CoordinateBasis(rank, "columns"),
    "rows": lambda rank: CoordinateBasis(rank, "rows"),
    "lines": CoordinateBasis,
    "top-columns": lambda rank: CoordinateBasis(rank, "columns", "greedy"),
    "top-rows": lambda rank: CoordinateBasis(rank, "rows", "greedy"),
    "entries": EntryBasis,
}


def instead(given: "str | Basis | None", own: Basis) -> Basis:
    """A method's own basis, or the one given in its place: by name, recorded, or any other."""
    if given is None:
        return own
    return given.standing_for(own) if isinstance(given, Basis) else make_basis(given, own.rank)


def make_basis(choice: "str | Basis", rank: int | float) -> Basis:
    """A basis from its name, or the given one."""
    if isinstance(choice, Basis):
        return choice
    return BASES[check_choice("basis", choice, tuple(BASES))](rank)
