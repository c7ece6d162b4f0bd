"""Takes steps on an engine in a process of its own, and prints a line each: python take_steps.py MODEL JSON."""

import json
import os
import sys
import time

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


def main(path, steps, engine, ours, settings, journal=None, distributed=None, kill_worker_at=None):
    import torch
    from serving.engines import EPS, OPTIONS, many
    from vllm import LLM

    from lozo_kernels.vllm import LOZO, engine_options, nll

    options = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 2048}
    llm = LLM(path, **options | {"max_num_seqs": 64} | engine_options(**OPTIONS | ours) | engine)
    rank = 0
    if distributed is not None:
        rank, world = distributed["rank"], distributed["world"]
        torch.distributed.init_process_group("gloo", init_method=distributed["init"], rank=rank, world_size=world)
        settings["parallel"] = distributed["mode"]
    more = {} if journal is None else {"journal": journal, "resume": True}
    optimizer = LOZO(llm, lr=2e-4, eps=EPS, **settings, **more)
    shared = distributed is not None and distributed["mode"] == "examples"
    for i in range(optimizer.steps_done, steps):
        if i == kill_worker_at:
            import psutil

            for child in psutil.Process().children(recursive=True):
                child.kill()
            time.sleep(3)  # vLLM notices it, and the next call says so; a call that is under way then would wait for ever
        some = many(i)
        loss = optimizer.step(nll(some[rank::world] if shared else some))
        print(json.dumps({"step": i, "c": optimizer.info.c.tolist(), "loss": float(loss)}), flush=True)
    if journal is not None:
        optimizer._recorded.close()


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
