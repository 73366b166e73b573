"""Requests as OpenAI's and LitGPT's clients send them. Settings that this server does not have are refused, unknown ones are ignored.

Types are strict: neither true nor "1" is a number.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from litgpt.generate.sampling import Sampling

MOST_STOPS = 16
MOST_CHOICES = 16
Text = Annotated[str, Field(max_length=2**21)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
OF_OPENAI = ("tools", "functions", "audio", "modalities", "echo", "suffix", "best_of", "web_search_options", "use_beam_search")
OF_STRUCTURE = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")  # vLLM's, as are the next
OF_VLLM = ("chat_template", "chat_template_kwargs", "continue_final_message", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words")
UNSUPPORTED = (*OF_OPENAI, *OF_STRUCTURE, *OF_VLLM)


class Body(BaseModel):
    model_config = ConfigDict(strict=True)


class Settings(Body):
    """How to draw, common to all requests. None: the server's default."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="among this many of the most probable tokens; 0 or -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Annotated[Token, Strict(False)], Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Settings:
        extra = self.model_extra or {}
        for name in UNSUPPORTED:
            if extra.get(name) and extra[name] != ["text"] and (name, extra[name]) != ("best_of", 1):
                raise ValueError(f"{name} is not supported by this server")
        if extra.get("tool_choice") not in (None, "none", "auto"):
            raise ValueError("tool_choice is not supported by this server: it has no tools")
        if (kind := (extra.get("response_format") or {"type": "text"})) != {"type": "text"}:
            raise ValueError(f"response_format {str(kind)[:60]} is not supported by this server: only text")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self) -> dict[str, Any]:
        """Return the settings of `engine.Sampling` that the request gives."""
        values = {item.name: value for item in fields(Sampling) if (value := getattr(self, item.name)) is not None}
        return values | ({"top_k": max(0, values["top_k"])} if "top_k" in values else {})


class Part(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None  # without tools there is none, and it is not left out in silence
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    thinking: Text | None = None
    name: Text | None = None
    tool_call_id: Text | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as prompt styles read it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        more = self.model_dump(exclude={"role", "content", "tool_calls"}, exclude_none=True)
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **more}


class StreamOptions(Body):
    include_usage: bool = False


class Completion(Settings):
    """The body of /v1/completions: the prompts are continued as they are, without the prompt style."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]]
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else list(prompt)

    @property
    def top(self) -> int | None:
        return self.logprobs


class Chat(Settings):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Predict(Settings):
    """The body of /predict, LitGPT's: the prompt is a question in the prompt style."""

    prompt: Text
    max_new_tokens: int | None = Field(None, ge=1)


class Adapter(Body):
    """An adapter that is loaded or unloaded while the server runs, as vLLM's clients request it."""

    lora_name: str = Field(min_length=1, max_length=200)


class AdapterFolder(Adapter):
    lora_path: str = Field(pattern=r"^[^\x00]{1,1000}$")
