"""The methods by name, and how many pairs each may hold or read.

A sequence's budget is its whole allowance divided by CR: k = max(1, ceil((prompt + max new tokens) / CR))
pairs in every KV head, the prompt's own tokens and the token being written included.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

MAX_QUEST_PAGE = 16
SINKS = 4


@dataclass(frozen=True)
class Policy:
    """A method with its compression ratio. Construction raises ValueError on a bad value."""

    cr: float = 1.0
    """Compression ratio, at least 1."""
    name: ClassVar[str]

    def __post_init__(self) -> None:
        is_number = isinstance(self.cr, int | float) and not isinstance(self.cr, bool)
        if not is_number or not 1 <= self.cr < math.inf:
            raise ValueError(f"cr of {self.name} is {self.cr!r}, expected a finite number of at least 1")

    def budget(self, tokens_B: "Tensor") -> "Tensor":
        """[B] int64: k of sequences that come to `tokens_B` tokens with all they may generate."""
        return (tokens_B.double() / self.cr).ceil().long().clamp(min=1)


@dataclass(frozen=True)
class Vanilla(Policy):
    """Holds and reads everything: the plain model."""

    name = "vanilla"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cr != 1:
            raise ValueError(f"cr of vanilla is {self.cr}, expected 1: it keeps every pair")


@dataclass(frozen=True)
class TOVA(Policy):
    """Oren et al. 2024, arXiv 2401.06104: drops the token to which the latest query gave least weight in the
    mean over all query heads of the layer, in every KV head alike."""

    name = "tova"


@dataclass(frozen=True)
class H2O(Policy):
    """Zhang et al. 2023, arXiv 2306.14048: each KV head holds its latest tokens, and of the others those with
    the most weight summed over all queries so far (mean over the query heads of the group).

    k // 2 pairs for those heavy hitters, the rest for the latest tokens: of an odd k they get one more.
    """

    name = "h2o"

    def recent(self, budget_B: "Tensor") -> "Tensor":
        """[B] int64: latest tokens that are safe, the one being written included."""
        return budget_B - budget_B // 2


@dataclass(frozen=True)
class Window(Policy):
    """Xiao et al. 2023, arXiv 2309.17453: the first tokens and the latest, at the positions they had in the
    text. (The paper moves them together instead; at lengths the model was trained for, both are defined.)"""

    name = "window"

    def sinks(self, budget_B: "Tensor") -> "Tensor":
        """[B] int64: first tokens that stay; fewer than SINKS where they would take more than half of k."""
        return (budget_B // 2).clamp(max=SINKS)


@dataclass(frozen=True)
class Quest(Policy):
    """Tang et al. 2024, arXiv 2406.10774: holds everything, and reads the pages of pairs that could have the
    highest scores. Every layer does; the paper's code leaves the first two dense."""

    page_size: int | None = None
    """Consecutive pairs that share a summary; None for min(16, 2 CR). Not the pool's pages."""

    name = "quest"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.page_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"page_size of quest is {size!r}, expected None or an integer of at least 1")

    @property
    def pairs_per_page(self) -> int:
        return self.page_size or min(MAX_QUEST_PAGE, int(2 * self.cr))

    def pages(self, budget_B: "Tensor") -> "Tensor":
        """[B] int64: pages to read, the one being filled included."""
        return -(-budget_B // self.pairs_per_page)


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Vanilla, TOVA, H2O, Quest, Window)}
METHODS = tuple(POLICIES)


def make_policy(name: str, cr: float = 1.0) -> Policy:
    """The method of that name; its class takes what else may be set.

    Raises:
        ValueError: unknown name, or a ratio that the method does not take.
    """
    if name not in POLICIES:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    return POLICIES[name](cr)
