"""Parts of a batch: what each process sees of it."""

import pytest
import torch

from robustkern import Draw
from robustkern.jacobian import jacobian_norm
from robustkern.losses import JacobianPenalty
from robustkern.sharding import Shard


@pytest.mark.parametrize("total, size", [(1, 1), (7, 2), (7, 3), (8, 4), (3, 5)])
def test_shards_are_a_partition(total, size):
    shards = [Shard.of(rank, size, total) for rank in range(size)]
    rows = torch.cat([shard.samples() for shard in shards if not shard.idle])
    assert rows.tolist() == list(range(total)) and sum(shard.share for shard in shards) == pytest.approx(1.0)
    whole = torch.randn(total, 3)
    assert all(torch.equal(shard.rows(whole), whole[shard.samples()]) for shard in shards)
    assert all(shard.size >= 1 for shard in shards)


def test_shards_that_make_no_sense_are_refused():
    for offset, size, total in ((0, 0, 3), (-1, 2, 3), (2, 2, 3)):
        with pytest.raises(ValueError, match="rows must lie in the batch"):
            Shard(offset, size, total)
    with pytest.raises(ValueError, match="expected 3 rows"):
        Shard(0, 1, 3).rows(torch.zeros(2))
    with pytest.raises(ValueError, match="shard has 1 rows, x has 2"):
        JacobianPenalty()(torch.nn.Flatten(), torch.rand(2, 3), torch.tensor([0, 1]), Draw(shard=Shard(0, 1, 3)))


@pytest.mark.parametrize("kind", ["plain", "fisher"])
def test_projections_of_a_part_are_those_of_the_whole(kind):
    def norms(rows, first):
        x = images[rows].requires_grad_()
        return jacobian_norm(model(x), x, 2, kind=kind, first=first, generator=torch.Generator().manual_seed(3))

    images, model = torch.rand(7, 5), torch.nn.Linear(5, 4)
    whole = norms(slice(0, 7), 0)
    torch.testing.assert_close(torch.cat([norms(slice(0, 3), 0), norms(slice(3, 7), 3)]), whole)
    assert not torch.allclose(norms(slice(3, 7), 0), whole[3:])
    with pytest.raises(ValueError, match="first must be an integer of at least 0, got -1"):
        norms(slice(0, 7), -1)
