"""Serves a model with SGLang: the keyword arguments of ``ServerArgs`` come as JSON on standard input."""

import json
import sys

# SGLang starts its schedulers with multiprocessing's "spawn", which imports this file again in each of them: what is
# outside this guard runs there too.
if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**json.load(sys.stdin)))
