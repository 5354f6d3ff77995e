"""M1 to M10: routing, experts and ranks."""

from ..row import Mutant, Row

ROWS = [
    Row(
        "M2",
        ("tests/inference/test_engine.py::test_M2_P3_32_requests_in_one_batch_give_what_each_gives_alone",),
        Mutant("inference/run/context.py", "dropless=taken is None", "dropless=False"),
    ),
    Row(
        "M7",
        ("tests/inference/run/test_parity.py::test_M7_the_server_runs_the_trainers_model_and_router",),
        Mutant(
            "inference/engine.py",
            "        engine = cls(model, tokenizer, config, chat, ranks=ranks)\n",
            "        for module in model.modules():\n"
            "            if type(module).__name__ == 'SwitchRouter':\n"
            "                module.__class__ = type('Served', (type(module),), {})\n"
            "        engine = cls(model, tokenizer, config, chat, ranks=ranks)\n",
        ),
    ),
]
