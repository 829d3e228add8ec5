"""Single layers of the baselines on keys, queries and weights small enough to work out on paper.

For the evicting methods, key j is the j-th unit vector, so that a query made of log-weights attends with
just these weights. Value j is the j-th unit vector, so that the output shows what was read.
"""

import pytest
import torch

from megatron_dms.hf.sparse_attention_dms import NewTokens
from megatron_dms.inference.baselines import METHODS, make_policy
from megatron_dms.inference.baselines.cache import LAYERS, BaselineCache
from megatron_dms.inference.baselines.policies import H2O, TOVA, Quest, Window
from tests.support.tools import run_python

TOKENS, HEADS, GROUPS = 12, 4, 2
UNIT = torch.eye(TOKENS).double()


class Layer:
    """One sequence through a layer of `policy`, with unit vectors as values."""

    def __init__(self, policy, prompt: int, new: int, keys=UNIT) -> None:
        self.layer = LAYERS[type(policy)](policy, new)
        self.prompt, self.keys, self.seen = prompt, keys, 0

    def __call__(self, q_HTD) -> list[list[int]]:
        """Feed as many tokens as there are queries; return which tokens the last one read, for each KV
        head."""
        T = q_HTD.shape[1]
        tokens = slice(self.seen, self.seen + T)
        k_BGTD, v_BGTD = (x[tokens].expand(1, GROUPS, -1, -1) for x in (self.keys, UNIT))
        new = NewTokens.place(torch.tensor([self.seen]), T, None)
        self.out_HD = self.layer.take(q_HTD[None], k_BGTD, v_BGTD, new, 1.0)[0, :, -1]
        self.seen += T
        by_group = self.out_HD.view(GROUPS, -1, TOKENS)
        assert torch.equal(by_group[:, 0] > 1e-9, by_group[:, 1] > 1e-9), "a group reads one set of pairs"
        return [torch.nonzero(row[0] > 1e-9).flatten().tolist() for row in by_group]

    def cost(self) -> tuple[int, int, int]:
        """Return reads, drops and memory of the latest forward, in pairs; they are the same in both KV
        heads."""
        layer = self.layer
        values = layer.read_BG, layer.evicted_BG.long(), layer.occupied_BG
        assert all(v[0, 0] == v[0, 1] for v in values)
        return tuple(int(v[0, 0]) for v in values)


def weights(*rows: dict[int, float]) -> torch.Tensor:
    """Return queries [heads, 1, TOKENS] that give the named tokens these weights, of whatever sum.

    The other tokens get 1e-6 of these weights.
    """
    q_HD = torch.full((len(rows), TOKENS), 1e-6).double()
    for head, row in enumerate(rows):
        for token, weight in row.items():
            q_HD[head, token] = weight
    return q_HD.log()[:, None]


def prompt(*queries: torch.Tensor) -> torch.Tensor:
    return torch.cat(queries, dim=1)


EVEN = torch.zeros(HEADS, 1, TOKENS).double()


def test_tova_by_hand():
    """Catches a mean over the KV head's own queries, drops that differ between heads, and added-up scores."""
    layer = Layer(TOVA(8 / 3), 4, 4)  # k = 3
    last = weights(
        {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1},
        {0: 0.4, 1: 0.1, 2: 0.2, 3: 0.3},  # KV head 0 alone would drop 1, 2 or 3
        {0: 0.1, 1: 0.1, 2: 0.2, 3: 0.6},
        {0: 0.1, 1: 0.1, 2: 0.7, 3: 0.1},  # KV head 1 alone could drop 0
    )  # the mean: 0.25, 0.15, 0.325, 0.275
    assert layer(prompt(EVEN, EVEN, EVEN, last)) == [[0, 1, 2, 3]] * 2
    assert layer.cost() == (4, 1, 3)
    assert sorted(layer.layer.position_NC[0].tolist()) == [0, 2, 3]
    # Before token 4 the prompt's scores drop 0. Its own query makes 3 the worst.
    assert layer(weights(*[{2: 0.3, 3: 0.15, 4: 0.55}] * HEADS)) == [[2, 3, 4]] * 2
    assert layer.cost() == (3, 1, 3)
    # 5 has had no query but its own, which gives it least: TOVA keeps no one safe.
    assert layer(weights(*[{2: 0.5, 4: 0.4, 5: 0.1}] * HEADS)) == [[2, 4, 5]] * 2
    assert layer(EVEN) == [[2, 4, 6]] * 2


def test_h2o_by_hand():
    """Catches one score for all KV heads, the last query's weights alone, a latest token dropped, and heavy
    hitters that get the odd one."""
    layer = Layer(H2O(8 / 3), 4, 4)  # k = 3: one heavy hitter and the latest two
    # Queries 0 and 2 are even: 1.33, 0.33, 0.33. Query 1 gives KV head 1 the other way round.
    second = weights({0: 0.9, 1: 0.1}, {0: 0.9, 1: 0.1}, {0: 0.1, 1: 0.9}, {0: 0.1, 1: 0.9})
    last = weights(*[{0: 0.1, 1: 0.7, 2: 0.1, 3: 0.1}] * HEADS)
    # KV head 0: 2.33, 1.13; KV head 1: 1.53, 1.93 (0.43, 0.1 in both): the last query alone would keep 1.
    assert layer(prompt(EVEN, second, EVEN, last)) == [[0, 1, 2, 3]] * 2
    assert layer.cost() == (4, 1, 3)
    assert layer.layer.position_NC.tolist() == [[0, 2, 3], [1, 2, 3]]
    expected = torch.tensor([[2.3333, 0.4333, 0.1], [1.9333, 0.4333, 0.1]]).double()
    torch.testing.assert_close(layer.layer.score_NC, expected, rtol=0, atol=1e-3)
    # Beside token 4 only 3 is safe, though it has the least.
    assert layer(EVEN) == [[0, 3, 4], [1, 3, 4]]
    assert layer(EVEN) == [[0, 4, 5], [1, 4, 5]]
    assert layer.cost() == (3, 1, 3)


def test_h2o_scores_add_up():
    """Catches a new pair that inherits the score of the one whose slot it takes."""
    layer = Layer(H2O(4), 4, 8)  # k = 3
    layer(prompt(EVEN, EVEN, EVEN, EVEN))  # token 0 has 2.08
    for _ in range(3):
        layer(EVEN)  # a third each
        assert layer.layer.position_NC[0].tolist().count(0) == 1
    by_position = dict(
        zip(layer.layer.position_NC[0].tolist(), layer.layer.score_NC[0].tolist(), strict=True)
    )
    assert by_position == pytest.approx({0: 2.0833 + 1, 5: 2 / 3, 6: 1 / 3}, abs=1e-3)


@pytest.mark.parametrize(
    ("cr", "k", "expected"),
    [
        (12.0, 1, [10]),
        (6.0, 2, [0, 10]),
        (2.4, 5, [0, 1, 8, 9, 10]),
        (12 / 9, 9, [0, 1, 2, 3, 6, 7, 8, 9, 10]),
    ],
)
def test_window_by_hand(cr, k, expected):
    """Catches sinks beyond half of the budget, and one pair too many or too few."""
    layer = Layer(Window(cr), 7, 5)
    assert int(layer.layer.policy.budget(torch.tensor(12))) == k
    layer(EVEN.expand(-1, 7, -1))
    for _ in range(3):
        layer(EVEN)
    assert layer(EVEN) == [expected] * 2
    assert layer.cost() == (k, 1, k)


def quest_layer() -> Layer:
    """Return a layer with pages of 2, of which 2 are read: k = 12 / 3.

    Only the first two channels of keys matter.
    """
    keys = torch.zeros(TOKENS, TOKENS).double()
    page_keys = [[1, 0], [0, 1], [0.9, 0.9], [0.9, 0.9], [-1, -1], [-1, -1]]
    keys[:6, :2] = torch.tensor(page_keys, dtype=torch.float64)
    layer = Layer(Quest(3.0, page_size=2), 9, 3, keys)
    layer(EVEN.expand(-1, 9, -1))
    return layer


def test_quest_by_hand():
    """Catches pages chosen by their best key (page 1, with 3.6), by the mean key, or without the last."""
    layer = quest_layer()
    assert layer.cost() == (9, 0, 9 + 5)
    q_HD = torch.full((HEADS, 1, TOKENS), 2.0).double()  # bounds 4, 3.6, -4, 0, 0
    assert layer(q_HD) == [[0, 1, 8, 9]] * 2
    assert layer.cost() == (5 + 4, 0, 10 + 5)
    least, greatest = layer.layer.least_NOD[0, :, :2], layer.layer.greatest_NOD[0, :, :2]
    assert torch.equal(least[:3], torch.tensor([[0, 0], [0.9, 0.9], [-1, -1]], dtype=torch.float64))
    assert torch.equal(greatest[:3], torch.tensor([[1, 1], [0.9, 0.9], [-1, -1]], dtype=torch.float64))
    assert layer(q_HD) == [[0, 1, 10]] * 2  # a page has been opened
    assert layer.cost() == (6 + 3, 0, 11 + 6)
    assert layer(-q_HD) == [[4, 5, 10, 11]] * 2
    assert layer.cost() == (6 + 4, 0, 12 + 6)


def test_quest_joins_the_heads_of_a_group_by_shares():
    """Heads with bounds (4, 3.6, -4, 0, 0) and (0, -5.4, 6, 0, 0): shares of 0.59 for page 0 and 0.99 for
    page 2 join to 0.29 and 0.50. Catches the sum of the bounds, by which page 0 would win with 4 against
    2."""
    layer = quest_layer()
    q_HD = torch.tensor([2.0, -3.0, 2.0, 2.0]).double()[:, None, None].expand(-1, 1, TOKENS)
    assert layer(q_HD) == [[4, 5, 8, 9], [0, 1, 8, 9]]


def test_quest_reads_densely_where_that_is_no_more():
    """8 tokens, pages of 2, 2 of them: 4 summaries and 4 pairs are 8 reads. Catches summaries read for
    nothing, and a page left out though all is counted."""
    layer = Layer(Quest(3.0, page_size=2), 7, 5)
    layer(EVEN.expand(-1, 7, -1))
    assert layer(EVEN) == [list(range(8))] * 2
    assert layer.cost() == (8, 0, 8 + 4)


def test_budgets():
    """Catches rounding down, a budget of 0, and parts that do not add up."""
    tokens_B = torch.tensor([1, 99, 100, 101, 300])
    assert TOVA(4.0).budget(tokens_B).tolist() == [1, 25, 25, 26, 75]
    assert TOVA(1000.0).budget(tokens_B).tolist() == [1] * 5
    assert TOVA(1.2).budget(tokens_B).tolist() == [1, 83, 84, 85, 250]
    k_B = torch.tensor([1, 2, 3, 8, 9])
    assert H2O(2.0).recent(k_B).tolist() == [1, 1, 2, 4, 5]
    assert Window(2.0).sinks(k_B).tolist() == [0, 1, 1, 4, 4]
    assert [Quest(cr).pairs_per_page for cr in (1, 1.7, 4, 8, 20)] == [2, 3, 8, 16, 16]
    assert Quest(4.0).pages(k_B).tolist() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_policy("snapkv", 2.0), "method is 'snapkv', expected one of vanilla, tova"),
        (lambda: make_policy("vanilla", 2.0), "cr of vanilla is 2.0, expected 1"),
        (lambda: make_policy("tova", 0.5), "cr of tova is 0.5"),
        (lambda: make_policy("h2o", float("nan")), "cr of h2o is nan"),
        (lambda: make_policy("quest", float("inf")), "cr of quest is inf"),
        (lambda: make_policy("window", True), "cr of window is True"),
        (lambda: Quest(2.0, page_size=0), "page_size of quest is 0"),
    ],
)
def test_bad_policies_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_names_come_without_torch():
    """A tool's --help lists the names, and does not wait for an import of torch. Catches: an import of
    torch where only the names are."""
    code = (
        "import sys; from megatron_dms.inference.baselines import METHODS; "
        "print(*METHODS, 'torch' in sys.modules)"
    )
    done = run_python("-c", code)
    assert done.status == 0, done.error
    assert done.out.split() == ["vanilla", "tova", "h2o", "quest", "window", "False"]


def test_the_state_is_all_there_is():
    """Compares the tensors of a layer with those that follow the sequences and those that count as bytes.
    Catches a tensor that the fork forgets."""
    for method in METHODS[1:]:
        cache = BaselineCache(1, make_policy(method, 3.0), 8)
        layer = Layer(make_policy(method, 3.0), 4, 8)
        layer(EVEN.expand(-1, 4, -1))
        made = {
            name
            for name, value in vars(layer.layer).items()
            if isinstance(value, torch.Tensor) and name not in ("read_BG", "evicted_BG")
        }
        assert made == set(cache.layers[0].memory)
