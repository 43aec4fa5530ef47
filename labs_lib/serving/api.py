"""The bodies of requests and responses, in the shapes of OpenAI's, LoRAX's and vLLM's APIs. No logic.

A field of those APIs that this server does not implement is declared with the one value that changes nothing, so that
asking for more is an error and not silence; a field that is not declared is an error too. Fields that never change an
answer (`user`, `metadata`, ...) are accepted and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text: tokenizers and UTF-8 both choke on it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is not text") from None
    return text


def _boolean(value: object) -> object:
    """Literal[False] by itself takes 0."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("it is true or false")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
No = Annotated[Literal[False], BeforeValidator(_boolean)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None  # an empty list, or null
NoEntries = Annotated[dict[str, Any], Field(max_length=0)] | None
One = Annotated[int, Field(ge=1, le=1)]  # not Literal[1], which takes true
Naught = Annotated[int, Field(ge=0, le=0)]
Zero = Annotated[float, Field(ge=0, le=0)] | None
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]

#: Declared only to be refused with a value that would change the answer; the error message says so.
NOT_SUPPORTED = frozenset(
    "n best_of echo logprobs top_logprobs logit_bias presence_penalty frequency_penalty suffix tools tool_choice "
    "functions function_call response_format modalities audio prediction reasoning_effort web_search_options verbosity "
    "adapter_source merged_adapters repetition_penalty return_full_text top_k truncate typical_p watermark "
    "decoder_input_details return_k_alternatives".split()
)


class Body(BaseModel):
    """A request: strict types (no "1" for 1), no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------------------- OpenAI


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # random padding, which we never send


class Generate(Body):
    """What completions and chats share."""

    model: Text = Field(
        description="Your tenant's name (its current adapter), `tenant:version`, or the base model."
    )
    max_tokens: Count | None = None
    temperature: Temperature | None = Field(None, description="0 is greedy; 1 by default, as OpenAI's.")
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        None, description="vLLM's extension, for benchmarks: always `max_tokens` tokens."
    )
    # with their neutral values only
    n: One | None = None
    logit_bias: NoEntries = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    # accepted and ignored: they never change an answer
    user: Text | None = None


class CompletionRequest(Generate):
    prompt: Text | list[TokenId] | Annotated[list[Text], Field(min_length=1, max_length=1)] = Field(
        description="Text (the tokenizer adds its begin token) or token ids (used as they are)."
    )
    best_of: One | None = None
    echo: No | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Generate):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: No | None = None
    top_logprobs: Naught | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None
    verbosity: None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[Text, Text] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Origin(BaseModel):
    """Which weights made the tokens; `adapter` null, version null, slot 0 and generation 0 are the base model."""

    adapter: str | None = Field(description="sha256 of the adapter version's files.")
    version: int | None = Field(description="Number of the version in the registry.")
    slot: int
    generation: int = Field(description="Of the slot: it grows each time the slot is given to an adapter.")


Finish = Literal["stop", "length"]


class TextChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Finish | None


class Completion(BaseModel):
    """Also a chunk of a stream; `provenance` is then in the last chunk that has a choice, and in that of the usage."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    provenance: Origin | None = None


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: Said
    logprobs: None = None
    finish_reason: Finish


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    provenance: Origin


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None = Field(None, description="The base model of an adapter.")
    version: int | None = None
    adapter: str | None = Field(None, description="sha256 of the adapter version's files.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


# -------------------------------------------------------------------------------------------------------------- LoRAX


class LoraxParameters(Body):
    adapter_id: Text | None = Field(
        None, description="Your tenant's name or `tenant:version`; null is the base model."
    )
    adapter_source: Literal["local"] | None = None
    api_token: Text | None = None  # for adapters on a hub, which we never fetch
    max_new_tokens: Count | None = None
    do_sample: bool = False
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops = []
    ignore_eos_token: bool = False
    details: bool = False
    # with their neutral values only
    merged_adapters: None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    return_full_text: No | None = None
    top_k: None = None
    truncate: None = None
    typical_p: None = None
    best_of: One | None = None
    watermark: No | None = None
    decoder_input_details: No | None = None
    return_k_alternatives: None = None
    response_format: None = None


class LoraxRequest(Body):
    inputs: Annotated[Text, Field(min_length=1)]
    parameters: LoraxParameters | None = None


class LoraxCompatRequest(LoraxRequest):
    """What the `lorax-client` package posts to `/`."""

    stream: bool = False


class LoraxToken(BaseModel):
    id: int
    text: str
    logprob: float = Field(0.0, description="The client requires a number; it is not computed, always 0.")
    special: bool


class LoraxEnd(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None = None


class LoraxDetails(LoraxEnd):
    prefill: list[LoraxToken] = []
    tokens: list[LoraxToken]


class LoraxResponse(BaseModel):
    generated_text: str
    details: LoraxDetails | None = None
    provenance: Origin


class LoraxError(BaseModel):
    error: str
    error_type: str


# ------------------------------------------------------------------------------------------------------ vLLM and admin


class LoadAdapter(Body):
    lora_name: Text = Field(description="The tenant.")
    lora_path: Text = Field(description="A PEFT adapter folder below the server's adapter root.")
    load_inplace: bool = Field(False, description="Publish a new version although the tenant has one.")


class UnloadAdapter(Body):
    lora_name: Text
    lora_int_id: int | None = None  # vLLM's own number, which it ignores as well


class Rollback(Body):
    to: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="A version's number; null is the one before."
    )


class VersionCard(BaseModel):
    number: int
    adapter: str = Field(description="sha256 of the adapter version's files.")
    state: str
    rank: int
    nbytes: int
    note: str


class TenantCard(BaseModel):
    name: str
    current: int | None
    versions: list[VersionCard]


class TenantList(BaseModel):
    tenants: list[TenantCard]


class Health(BaseModel):
    status: Literal["ok", "shutting down", "isolation broken"]
    model: str


class Live(BaseModel):
    """What the live page shows (`live.picture`): slots, tenants with their tier and latency, and moves since `seen`."""

    now: float
    seen: int
    slots: list[dict]
    running: int
    rows: int
    waiting: int
    isolated: bool | None
    tenants: list[dict]
    moves: list[dict]


class Isolation(BaseModel):
    """What has been proved about who got whose adapter. `found` is the first leak, in words; `canaries` answered right;
    `oracle` counts judged results in all and per tenant."""

    watched: bool
    isolated: bool | None = None
    found: str | None = None
    canaries: int = 0
    oracle: dict = {}
