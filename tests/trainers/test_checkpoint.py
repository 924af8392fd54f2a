"""The promises of checkpoints: exact, readable by stock safetensors, refused when damaged."""

import pytest
import safetensors
import torch
from torch import nn

from nfm.trainers.checkpoint import (
    CheckpointError,
    pack,
    pack_weights,
    under_prefix,
    unpack,
    unpack_weights,
    with_prefix,
)

TENSORS = {
    "plain": torch.randn(3, 4),
    "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "view": torch.arange(12.0).reshape(3, 4).T[1:],
    "scalar": torch.tensor(3, dtype=torch.int64),
    "half": torch.randn(5).bfloat16(),
    "double": torch.randn(2, dtype=torch.float64),
}
META = {"seen": 3, "rate": 0.1 + 0.2, "nested": {"list": [1, None, True], "text": "α"}}


def test_tensors_and_meta_come_back_exactly():
    tensors, meta = unpack(pack(TENSORS, META))
    assert meta == META
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_equal_state_gives_equal_bytes():
    reordered = dict(reversed(TENSORS.items())), dict(reversed(META.items()))
    assert pack(TENSORS, META) == pack(*reordered)


def test_tensors_that_share_memory_are_each_kept():
    weight = torch.randn(4, 4)
    tensors, _ = unpack(pack({"embed": weight, "head": weight, "rows": weight[:2]}, {}))
    assert torch.equal(tensors["embed"], weight)
    assert torch.equal(tensors["head"], weight)
    assert torch.equal(tensors["rows"], weight[:2])


def test_stock_safetensors_reads_the_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pack(TENSORS, META))
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(TENSORS)
        assert torch.equal(file.get_tensor("plain"), TENSORS["plain"])


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b""])
def test_truncated_bytes_are_refused_with_the_remedy(damage):
    with pytest.raises(CheckpointError, match="remove the file"):
        unpack(damage(pack(TENSORS, META)))


def test_bytes_without_our_meta_are_refused():
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        unpack(safetensors.torch.save({"a": torch.zeros(1)}))


def test_weights_build_the_model_again():
    model = nn.Linear(3, 2)
    state, architecture = unpack_weights(pack_weights(model, {"in_features": 3, "out_features": 2}))
    again = nn.Linear(**architecture)
    again.load_state_dict(state)
    assert torch.equal(again.weight, model.weight)
    assert pack_weights(model.state_dict(), architecture) == pack_weights(model, architecture)


def test_a_training_state_is_refused_where_weights_belong():
    with pytest.raises(CheckpointError, match="no architecture"):
        unpack_weights(pack(TENSORS, META))


def test_prefixes_separate_states_in_one_file():
    both = {**with_prefix("model", {"a.b": torch.zeros(1)}), **with_prefix("model2", {"a.b": torch.ones(1)})}
    assert under_prefix("model", both) == {"a.b": torch.zeros(1)}
    assert under_prefix("model2", both) == {"a.b": torch.ones(1)}
