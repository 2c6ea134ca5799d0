"""vLLM's OpenAI-compatible server with a steered engine."""

from collections.abc import Sequence

import uvloop
from vllm.entrypoints.launchers.api_server.entry import run_server
from vllm.logger import configure_logging_from_args, init_logger
from vllm.utils.argparse_utils import FlexibleArgumentParser

from hf_value_steer.configuration.parse import ValueSteer
from hf_value_steer.vllm.admission import admission
from hf_value_steer.vllm.arguments import steered_engine_args
from hf_value_steer.vllm.memory import cpu_memory


try:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

logger = init_logger("vllm.hf_value_steer")
MIDDLEWARE = "hf_value_steer.vllm.http.SteeringReports"


def serve(model: str, value_steer: ValueSteer, arguments: Sequence[str] = ()) -> None:
    """Serve until the process is told to stop.

    Args:
        model (`str`): the backbone, a Hub id or a folder.
        value_steer: as in [`steered_engine_args`].
        arguments: further arguments of vLLM's command line.

    Raises:
        ValueError: if vLLM cannot honour the configuration, or an argument is one that steering sets.
    """
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="hf-value-steer serve"))
    chosen = cpu_memory()
    parser.set_defaults(**chosen)  # an argument counts as given if it differs from this, also vLLM's own default
    args = parser.parse_args(["--model", model, *arguments])
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    given.pop("model")
    for name, value in steered_engine_args(model, value_steer, **given).items():
        setattr(args, name, value)
    args.middleware = [*args.middleware, MIDDLEWARE]
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    served = admission(args.logits_processors[0]).served
    assert served is not None
    for line in served.describe():
        logger.info("Steering with %s", line)
    if chosen:
        logger.info("Memory of the CPU: --gpu-memory-utilization %s", args.gpu_memory_utilization)
    uvloop.run(run_server(args))
