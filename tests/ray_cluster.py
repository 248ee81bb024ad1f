"""A local Ray, and on it what Serve's configurations say, as a process of its own.

`python -m tests.ray_cluster DIRECTORY PORT` reads a command a line, and answers each with a line:
`deploy FILE` once Serve has taken the configuration, `look` with what Serve says of its
applications, as JSON. It ends, and Ray with it, at the end of its stdin or at SIGTERM.
"""

import json
import signal
import sys
from pathlib import Path

import ray
import yaml
from ray import serve
from ray.serve._private import api
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

NUM_CPUS = 1
START_TIMEOUT_S = 180
"""Ray's own, a minute, is short where others have the cores."""
OBJECT_STORE_BYTES = 80_000_000


def main(directory: str, port: str) -> None:
    ray.init(
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=directory,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    vars(api)["HTTP_PROXY_TIMEOUT"] = START_TIMEOUT_S  # which it imported, and does not export
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, proxy_location="HeadOnly")
    client = _get_global_client()
    assert client is not None
    try:
        say(f"ready: http://127.0.0.1:{port}/")
        for line in sys.stdin:
            command, _, argument = line.strip().partition(" ")
            if command == "deploy":
                config = yaml.safe_load(Path(argument).read_text())
                client.deploy_apps(ServeDeploySchema.model_validate(config))
                say("deployed")
            else:
                details = client.get_serve_details()
                say(f"seen: {json.dumps(details['applications'], default=str)}")
    finally:
        client.shutdown()  # Ray itself ends with the interpreter


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
