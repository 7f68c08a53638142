"""A model sharded by FSDP2 over two processes: its adapter is saved whole, and loaded in parts."""

import pytest
import torch
import torch.distributed as dist
from saved_cases import adapted, assert_same_state
from torch import nn

import ilora
from ilora import SequenceGate
from ilora.storage.save import save_pretrained

pytest.importorskip("safetensors")


class Tower(nn.Module):
    """Small and plain: the processes need not import transformers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 6)


def tower():
    torch.manual_seed(1)
    return Tower()


def worker(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = adapted(tower(), SequenceGate(6, 4), modules_to_save=("head",))
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    save_pretrained(model, folder / "saved", is_main_process=rank == 0)
    dist.barrier()
    path = ilora.save_adapter(model, folder / f"by-{rank}")
    assert path.exists() == (rank == 0)
    assert_same_state(ilora.load_adapter(tower(), folder / "saved").state_dict(), whole)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    ilora.load_adapter(model, folder / "saved")
    assert_same_state({key: value.full_tensor() for key, value in model.state_dict().items()}, whole)
    (folder / f"done-{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_sharded_models_are_saved_whole_and_loaded_in_parts(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # if it hangs
    # gloo may abort a process that is leaving: what it wrote before counts
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()
