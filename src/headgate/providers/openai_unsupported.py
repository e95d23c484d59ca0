"""What a job asks for that its shape has no words for, or that its service is known to refuse or to pass over."""

from collections.abc import Iterator

from headgate.config.variants import PLAIN, Parameter, Variant
from headgate.core.completion import Image, Job
from headgate.core.errors import InvalidRequest


def check_supported(provider: str, job: Job, variant: Variant) -> None:
    """InvalidRequest naming the first parameter that cannot be honoured."""
    param = _impossible(job)
    if param is not None:
        what = "token ids as prompt" if param == "prompt" else param
        raise InvalidRequest(
            f"The model {job.model.name} answers this as a {job.shape} model and does not support {what} there.",
            param=param,
            code="unsupported_parameter",
        )
    if variant is not PLAIN:
        _check_service(provider, job, variant)


def _check_service(provider: str, job: Job, variant: Variant) -> None:
    refused = variant.refused_in(job.shape)
    param: str | None = next((param for param in _asked(job) if param in refused), None)
    if job.n > 1 and not variant.takes_n:
        param = "n"
    if param is not None:
        what = {"prompt": "token ids as prompt", "detail": "the detail of an image"}.get(param, param)
        raise InvalidRequest(
            f"{what} is not supported with the model {job.model.name}: the provider {provider} does not take it.",
            param=param,
            code="unsupported_parameter",
        )


def _impossible(job: Job) -> str | None:
    """The parameter of the job that its shape has no words for, if there is one."""
    if job.shape == "completion":
        if job.tools is not None:
            return "tools"
        return "response_format" if job.response_format is not None else None
    if isinstance(job.prompt, tuple):
        return "prompt"
    if job.echo and (job.logprobs is not None or job.prompt is None):
        return "echo"
    if job.suffix:
        return "suffix"
    return "best_of" if job.best_of is not None else None


def _asked(job: Job) -> Iterator[Parameter]:
    """What the job asks for beyond the usual; a penalty of 0 and the like ask for nothing."""
    sampling = job.sampling
    if sampling.temperature is not None:
        yield "temperature"
    if sampling.top_p is not None:
        yield "top_p"
    if sampling.presence_penalty:
        yield "presence_penalty"
    if sampling.frequency_penalty:
        yield "frequency_penalty"
    if sampling.seed is not None:
        yield "seed"
    if sampling.stop:
        yield "stop"
    if sampling.logit_bias:
        yield "logit_bias"
    if job.best_of is not None:
        yield "best_of"
    if job.logprobs is not None:
        yield "logprobs"
    if job.echo:
        yield "echo"
    if job.suffix:
        yield "suffix"
    if isinstance(job.prompt, tuple):
        yield "prompt"
    if job.response_format is not None:
        yield "response_format"
    if job.tools is not None:
        yield "tools"
        if job.tools.choice not in (None, "auto"):
            yield "tool_choice"
        if job.tools.parallel is False:
            yield "parallel_tool_calls"
    for message in job.messages or ():
        if any(isinstance(part, Image) and part.detail in ("low", "high") for part in message.parts):
            yield "detail"
