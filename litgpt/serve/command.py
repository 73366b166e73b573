"""`litgpt serve`: a model and its adapters behind an HTTP interface."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from litgpt.args import ABOVE_0, POSITIVE, Quantization, require_ranges, setting
from litgpt.errors import UserError, missing_package
from litgpt.files import expand_path
from litgpt.generate.base import say_loaded
from litgpt.streams import keep_secret

API_KEY = "LIT_SERVER_API_KEY"  # environment variable, LitServe's


@dataclass
class Serve:
    """Serve a model and its adapters: OpenAI's /v1/chat/completions, /v1/completions and /v1/models, LitGPT's /predict, and a page at /."""

    checkpoint_dir: Path
    """Folder of a base model, a merged model, an adapter (its base is served too) or a run."""
    adapters: Optional[list[str]] = None
    """Adapters of the same base as NAME=FOLDER, which requests name as `model`. Skip2-LoRA's run in one batch with the base."""
    adapter_dir: Optional[Path] = None
    """Folder below which /v1/load_lora_adapter may load adapters while the server runs. null: the models stay as they are."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0: all addresses of this machine; give an api_key then."""
    port: int = 8000
    """Port to listen on. 0: any free port."""
    max_new_tokens: int = setting(50, POSITIVE)
    """Longest answer of /predict in tokens, unless the request sets it."""
    temperature: Optional[float] = None
    """Below 1 sharpens, above 1 flattens the probabilities; 0 always takes the most probable token. null: the checkpoint's, or 0.8."""
    top_k: Optional[int] = None
    """Sample from this many of the most probable tokens; 0: from all. null: the checkpoint's, or 50."""
    top_p: Optional[float] = None
    """Sample from the smallest set of most probable tokens whose probabilities sum to at least this. null: the checkpoint's, or 1."""
    stream: bool = False
    """Stream the answers of /predict, one JSON object per line."""
    precision: Optional[str] = None
    """Number format: bf16-true, 32-true or 16-true. Default: bf16-true where the processor has it, else 32-true."""
    quantize: Optional[Quantization] = None
    """Keep the linear layers in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8)."""
    accelerator: str = "auto"
    """auto, cpu, cuda (or gpu), xpu or mps."""
    devices: int = 1
    """Number of devices; this server computes on one."""
    openai_spec: bool = False
    """No effect: OpenAI's interface and /predict are always there."""
    generate_strategy: Optional[Literal["sequential", "tensor_parallel"]] = None
    """How several devices divide the model. No effect: this server computes on one, and says so."""
    api_path: str = "/predict"
    """Path of LitGPT's /predict."""
    api_key: Optional[str] = None
    """Key that requests must carry, as `Authorization: Bearer KEY`. Safer in the environment variable LIT_SERVER_API_KEY."""
    access_token: Optional[str] = None
    """Hugging Face token, for a name on the hub that needs one."""
    max_batch: int = setting(16, POSITIVE)
    """Answers computed at a time."""
    max_queue: int = setting(64, POSITIVE)
    """Requests that may wait; further ones are refused (429)."""
    max_prompt_tokens: Optional[int] = None
    """Longest prompt in tokens. null: the model's context length."""
    timeout: float = setting(300.0, ABOVE_0)
    """Seconds that a request may take, waiting included; then its answer is cut."""

    def __post_init__(self) -> None:
        if self.devices != 1:
            raise UserError(f"devices is {self.devices}: this server computes on one device")
        require_ranges(self)
        if not self.api_path.startswith("/"):
            raise UserError(f"api_path is {self.api_path!r}: it must begin with /, for example /predict")
        if self.generate_strategy is not None:
            print(f"generate_strategy {self.generate_strategy}: this server computes on one device, which needs none", file=sys.stderr)
        self.folders = named(self.adapters or [])
        if self.adapter_dir is not None and not self.adapter_dir.is_dir():
            raise UserError(f"adapter_dir: there is no folder {self.adapter_dir}")

    def main(self) -> None:
        """Load the models and serve until SIGTERM or Ctrl-C."""
        key = self.api_key or os.environ.get(API_KEY) or None
        if key:
            keep_secret(key)
        try:
            import uvicorn  # noqa: F401

            from litgpt.serve.app import State, make_app
        except ImportError as error:
            raise missing_package("serve", error.name, "serve") from None
        from litgpt.generate.sampling import Sampling
        from litgpt.serve.models import Models
        from litgpt.serve.scheduler import Scheduler

        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        Sampling(**{**sampling, "top_k": self.top_k or None})  # an error is reported here
        socket, start = listen(self.host, self.port), time.perf_counter()
        models = Models(self.checkpoint_dir, self.folders, quantize=self.quantize, precision=self.precision, device=self.accelerator)
        say_loaded(f"{', '.join(models)}:", models.base.llm, self.quantize, start)
        scheduler = Scheduler(self.max_batch, self.max_queue)
        state = State(
            models=models,
            scheduler=scheduler,
            sampling=sampling,
            max_new_tokens=self.max_new_tokens,
            stream=self.stream,
            api_key=key,
            max_prompt_tokens=self.max_prompt_tokens,
            timeout=self.timeout,
            adapter_dir=self.adapter_dir and self.adapter_dir.resolve(),
        )
        try:
            run(make_app(state, self.host, self.api_path), socket, self.timeout)
        finally:
            scheduler.close()


def named(adapters: list[str]) -> dict[str, Path]:
    """Return the folders of NAME=FOLDER by name."""
    folders: dict[str, Path] = {}
    for entry in adapters:
        name, equals, folder = entry.partition("=")
        if not name or not equals or not folder:
            raise UserError(f"adapters: {entry!r} is not understood: write NAME=FOLDER, for example tuned=out/finetune/skip2lora")
        if name in folders:
            raise UserError(f"adapters: the name {name!r} is given twice")
        folders[name] = expand_path(folder)
    return folders


def listen(host: str, port: int) -> Any:
    """Return a socket that is bound to the address. Raises UserError if that is impossible."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise UserError(f"cannot listen on {host}, port {port}: {reason}. Choose another --port or --host") from None


def run(app: Any, socket: Any, timeout: float) -> None:
    """Serve until SIGTERM or Ctrl-C. Running answers are completed."""
    import uvicorn

    host, port = socket.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"Listening at http://{shown}:{port}: a chat page, and OpenAI's interface at /v1. Ctrl-C ends it.", file=sys.stderr, flush=True)
    settings: dict[str, Any] = {"timeout_graceful_shutdown": int(timeout) + 1, "server_header": False, "limit_concurrency": 1000}
    config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off", ws="none", **settings)
    uvicorn.Server(config).run(sockets=[socket])
