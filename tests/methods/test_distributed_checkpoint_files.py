"""Through torch.distributed.checkpoint's own files, in one process: saved, loaded into a fresh optimizer, continued alike."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tare.methods import registry
from tare.testing.subject import FORMS, Net, Subject, same, same_state, snapshot, train


@pytest.mark.parametrize("key", registry.keys("gradient"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saved_and_loaded_by_dcp(key: str, tmp_path: Path) -> None:
    subject, options = Subject(key), StateDictOptions(flatten_optimizer_state_dict=True)
    net, other = Net().to(torch.bfloat16), Net().to(torch.bfloat16)
    optimizer, fresh = (subject.build(n, storage=FORMS["int8"]) for n in (net, other))
    train(optimizer, net, 4)
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer, options=options)}, checkpoint_id=tmp_path)
    train(fresh, other, 1)
    holder = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
    dcp.load(holder, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, fresh, holder["optimizer"], options=options)
    other.load_state_dict(net.state_dict())
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        same_state(fresh.state[q], optimizer.state[p], key)
    train(optimizer, net, 3)
    train(fresh, other, 3)
    same(snapshot(other.named_parameters()), snapshot(net.named_parameters()), key)
