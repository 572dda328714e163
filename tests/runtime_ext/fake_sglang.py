"""Stand in for `sglang.launch_server`: starts in no time, and leaves as much behind as the real one can.

Copied into a package named `sglang` on the child's PYTHONPATH. `--fake` says how it behaves: `serve`, `die`
at the start, `hang` without ever becoming ready, or be `tidy` and start no other process. Uses the standard
library alone. A `/generate` makes it die.
"""

import argparse
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Deaf to SIGTERM and in a session of its own: a process that only a thorough guard ends.
STRAY = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--nccl-port", type=int)
    parser.add_argument("--model-path")
    parser.add_argument("--fake", default="serve")
    options, _ = parser.parse_known_args()
    if options.fake == "die":
        sys.exit("the fake was told to die")
    if options.fake != "tidy":
        leave_things_behind()
    if options.fake == "hang":
        time.sleep(600)
    ThreadingHTTPServer(("127.0.0.1", options.port), handler(options)).serve_forever()


def leave_things_behind() -> None:
    tempfile.mkstemp()
    subprocess.Popen([sys.executable, "-I", "-S", "-c", STRAY], start_new_session=True)
    descriptor = os.open(f"/dev/shm/sglang_loads_fake_{os.getpid()}.shm", os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(descriptor, 4096)
    globals()["kept"] = mmap.mmap(descriptor, 4096)


def handler(options: argparse.Namespace) -> type[BaseHTTPRequestHandler]:
    settings = {
        "model_path": options.model_path,
        "version": "fake",
        "device": "cpu",
        "max_total_num_tokens": 1000,
        "page_size": 1,
        "max_req_input_len": 900,
        "nccl_port": options.nccl_port,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(settings).encode())

        def do_POST(self) -> None:
            if self.path == "/generate":
                os.kill(os.getpid(), signal.SIGKILL)
            self.do_GET()

        def log_message(self, *args: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    main()
