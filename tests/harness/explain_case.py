"""A model, the engines' real messages about it, and what harness.explain answers."""

from __future__ import annotations

from harness.explain import main

ONE_RANK = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 13312,
    "num_hidden_layers": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 10000000,
    "tie_word_embeddings": False,
}
ARGS = (
    "server_args=ServerArgs(model_path='/models/one-rank', load_format='dummy', "
    "trust_remote_code=False, context_length={context}, kv_cache_dtype='fp8_e4m3', "
    "mem_fraction_static=0.903, max_running_requests={requests}, max_total_tokens=None, "
    "chunked_prefill_size=8192, page_size=1, tp_size=1, dp_size=1, attention_backend='fa3', "
    "disable_cuda_graph=False, cuda_graph_max_bs=256)\n"
)
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.21 GiB. GPU 0 has a total "
    "capacity of 139.80 GiB of which 1.15 GiB is free. Including non-PyTorch memory, this process "
    "has 138.64 GiB memory in use.\n"
)
TRACE = """Traceback (most recent call last):
  File "/env/sglang/srt/managers/scheduler.py", line 3500, in run_scheduler_process
    scheduler = Scheduler(
  File "/env/sglang/srt/mem_cache/memory_pool.py", line 832, in __init__
    self._create_buffers()
  File "/env/sglang/srt/mem_cache/memory_pool.py", line {line}, in {function}
    torch.zeros(
  File "/env/torch/utils/_device.py", line 116, in __torch_function__
    return func(*args, **kwargs)
"""
SGLANG_LOG = (
    ARGS.format(context=10000000, requests=None)
    + "Load weight begin. avail mem=138.12 GB\n"
    + "Load weight end. elapsed=3.20 s, type=LlamaForCausalLM, avail mem=129.36 GB, "
    + "mem usage=8.76 GB.\n"
    + TRACE.format(line=907, function="_create_buffers")
    + OOM
)
VLLM_LOG = (
    "INFO [utils.py:233] non-default args: {'model': '/models/one-rank', 'max_model_len': 10000000,"
    " 'gpu_memory_utilization': 0.95, 'kv_cache_dtype': 'fp8_e4m3', 'max_num_seqs': 16, "
    "'enforce_eager': True}\n"
    "INFO [core.py:114] Initializing a V1 LLM engine (v0.23.0) with config: "
    "model='/models/one-rank', max_seq_len=10000000, tensor_parallel_size=1, "
    "kv_cache_dtype=fp8_e4m3\n"
    "INFO [model_runner.py:320] Model loading took 6.38 GiB and 1.100000 seconds\n"
    "INFO [gpu_worker.py:480] Available KV cache memory: 124.83 GiB\n"
    "ERROR [core.py:700] ValueError: To serve at least one request with the model's max seq len "
    "(10000000), (228.88 GiB KV cache is needed, which is larger than the available KV cache "
    "memory (124.83 GiB). Based on the available memory, the estimated maximum model length is "
    "5453888. Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when "
    "initializing the engine.\n"
)


def ask(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def answered(capsys, *words):
    code, out, err = ask(capsys, *words)
    assert (code, err) == (0, "")
    return {line.split()[0]: line for line in reversed(out.split("\n\n")[0].splitlines())}, out


def refused(capsys, *words):
    code, out, err = ask(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("harness.explain: ") and err.count("\n") == 1
    return err
