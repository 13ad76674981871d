"""torchrun on two nodes, here two of its agents: a process that is killed costs a restart of all, and no result."""

import os
import subprocess
import sys

from flexolmo_megatron.convert.model import open_model
from flexolmo_megatron.exchange.digest import model_digest
from tests.distributed import free_ports
from tests.training.ranks import ROOT, Launcher

OPTIONS = ["parallel.tensor=1", "global_batch_size=4", "micro_batch_size=2", "save_interval=2"]


def essence(rows):
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_a_killed_process_of_one_node(expert_options, metrics, tmp_path):
    """Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, restarted processes find each other's addresses of before (torch
    2.13) and wait for ever; the node that lost nothing does not count the restart, so the run cannot tell."""
    run, agents = tmp_path / "killed", []
    (port,) = free_ports(1)
    for node in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                       "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if node == 1:
            environment |= {"DIE_AT_STEP": "3", "DIE_OF": "SIGKILL", "DIE_LOCAL_RANK": "0"}
        with open(tmp_path / f"node{node}", "w") as log:
            agents.append(subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1",
                 "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=x", "--local-addr=127.0.0.1",
                 str(ROOT / "tests/training/dying.py"), *expert_options(run, *OPTIONS)],
                env=environment, stdout=log, stderr=subprocess.STDOUT))
    launcher = Launcher(tmp_path)  # starts while they do
    try:
        statuses = [agent.wait(400) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # which ends its processes, too
            agent.wait(60)
    said = [(tmp_path / f"node{node}").read_text() for node in range(2)]
    assert statuses == [0, 0], said
    assert "failed (exitcode: -9)" in said[1] and f"resuming from {run}/checkpoints/step_00000002" in "".join(said)
    launcher.start(expert_options(tmp_path / "unbroken", *OPTIONS))
    assert launcher.wait() == [0, 0], launcher.output()
    launcher.close()
    assert essence(metrics(run)) == essence(metrics(tmp_path / "unbroken"))
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert model_digest(open_model(run)) == model_digest(open_model(tmp_path / "unbroken"))
