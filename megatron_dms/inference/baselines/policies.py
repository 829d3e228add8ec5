"""The methods by name, and the number of pairs that each may hold or read.

A sequence's budget is its greatest length divided by the CR: k = max(1, ceil((prompt + max new tokens) / CR))
pairs in every KV head. The budget includes the prompt's own tokens and the token being written.
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
        """[B] int64: k of each sequence, for `tokens_B` tokens of prompt and possible new tokens."""
        return (tokens_B.double() / self.cr).ceil().long().clamp(min=1)


@dataclass(frozen=True)
class Vanilla(Policy):
    """The plain model: it holds and reads every pair."""

    name = "vanilla"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cr != 1:
            raise ValueError(f"cr of vanilla is {self.cr}, expected 1: it keeps every pair")


@dataclass(frozen=True)
class TOVA(Policy):
    """Oren et al. 2024, arXiv 2401.06104. Drops the token to which the latest query gave the least weight, as
    the mean over all query heads of the layer; every KV head drops the same token."""

    name = "tova"


@dataclass(frozen=True)
class H2O(Policy):
    """Zhang et al. 2023, arXiv 2306.14048. Each KV head holds its latest tokens and the heavy hitters: the
    other tokens with the most weight, summed over all queries so far (mean over the group's query heads).

    The heavy hitters get k // 2 pairs and the latest tokens get the rest: one pair more if k is odd.
    """

    name = "h2o"

    def recent(self, budget_B: "Tensor") -> "Tensor":
        """[B] int64: the number of latest tokens that stay, the token being written included."""
        return budget_B - budget_B // 2


@dataclass(frozen=True)
class Window(Policy):
    """Xiao et al. 2023, arXiv 2309.17453. Holds the first and the latest tokens, at the positions that they
    have in the text. (The paper closes the gap in positions instead; at lengths for which the model was
    trained, both are defined.)"""

    name = "window"

    def sinks(self, budget_B: "Tensor") -> "Tensor":
        """[B] int64: the number of first tokens that stay: SINKS, but at most half of k."""
        return (budget_B // 2).clamp(max=SINKS)


@dataclass(frozen=True)
class Quest(Policy):
    """Tang et al. 2024, arXiv 2406.10774. Holds every pair, and reads the pages that could have the highest
    scores. All layers do so; the paper's code keeps the first two layers dense."""

    page_size: int | None = None
    """The number of consecutive pairs that share a summary; None for min(16, 2 CR). Quest's pages are not the
    pool's pages."""

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
        """[B] int64: the number of pages to read, the page being filled included."""
        return -(-budget_B // self.pairs_per_page)


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Vanilla, TOVA, H2O, Quest, Window)}
METHODS = tuple(POLICIES)


def make_policy(name: str, cr: float = 1.0) -> Policy:
    """The method of that name; options other than the ratio are set on its class.

    Raises:
        ValueError: the name is unknown, or the method does not take this ratio.
    """
    if name not in POLICIES:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    return POLICIES[name](cr)
