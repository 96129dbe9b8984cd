"""The calibrated weight of the KV loss is the same whatever ZeRO shards, since it is a ratio of two gradients."""

import json

import pytest

from kvds.experiment.workers import Worker, worker_environment


def test_auto_weight_is_the_same_in_every_stage(tmp_path):
    weights = {}
    worker = Worker(tmp_path / "log", worker_environment(0, ["cpu"]))
    try:
        for stage in (0, 2, 3):
            config = {"bf16": {"enabled": False}, "zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}
            (tmp_path / f"{stage}.json").write_text(json.dumps({**config, "steps_per_print": 10**9}))
            settings = {
                "model_name": "launch/quickstart_teacher", "student_init": "random", "kv_weight": "auto:2.0",
                "student_config_overrides": "num_hidden_layers=2,hidden_size=32,num_attention_heads=2,head_dim=16",
                "synthetic_problems": 8, "max_steps": 1, "batch_size": 4, "max_length": 64, "eval_subset_size": 0,
                "calibration_batches": 1, "deepspeed_config": str(tmp_path / f"{stage}.json"), "report_to": "none",
                "resume": "never", "output_dir": str(tmp_path / f"run{stage}"),
            }  # fmt: skip
            answer = worker.ask({"settings": settings, "ranks": 1, "in_process": True}, None)
            assert answer["status"] == "finished", answer
            weights[stage] = answer["last/kv/weight"]
    finally:
        worker.stop()
    assert weights[2] == pytest.approx(weights[0], rel=1e-4) and weights[3] == pytest.approx(weights[0], rel=1e-4)
    # The two gradients differ in size: a ratio of 1, as of one gradient read twice, would be wrong.
    assert abs(weights[0] - 2.0) > 0.05
