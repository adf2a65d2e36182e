"""A real SGLang server on a CPU, with a tiny model. Needs what requirements-sglang.txt names, and fails without it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from support.engines import wait_until
from support.processes import is_gone

from enginefsm.rehearsal.server import ServerRequestError, ServerStartError
from enginefsm.rehearsal.sglang import CPU_ENV, SGLangEngine, cpu_server_args

pytestmark = pytest.mark.usefixtures("nothing_else_below_this_process")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    subprocess.run([sys.executable, "-m", "enginefsm.rehearsal.tiny_model", str(directory)], check=True, timeout=120)
    return directory


@pytest.mark.timeout(300)
def test_a_real_server_comes_up_gives_tokens_and_is_gone_after_shutdown(model: Path, tmp_path: Path) -> None:
    engine = SGLangEngine(cpu_server_args(model), env=CPU_ENV, log_dir=tmp_path, startup_deadline_s=240)
    try:
        assert engine.init() == engine.url()
        assert engine.health_generate(timeout_s=30)

        answer = engine.generate("an engine", {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True})
        assert len(answer["output_ids"]) == 8
        assert answer["meta_info"]["completion_tokens"] == 8
        with pytest.raises(ServerRequestError, match="answered 400"):
            engine.generate("an engine", {"max_new_tokens": -1})

        processes = psutil.Process().children(recursive=True)
        assert {"sglang::schedul", "sglang::detoken"} <= {process.name()[:15] for process in processes}
    finally:
        engine.shutdown()
    assert all(is_gone(process) for process in processes)
    assert not engine.health_generate()


@pytest.mark.timeout(300)
def test_a_server_killed_with_its_owner_while_it_loads_leaves_no_process(model: Path, tmp_path: Path) -> None:
    script = f"""
        from enginefsm.rehearsal.sglang import CPU_ENV, SGLangEngine, cpu_server_args
        SGLangEngine(cpu_server_args({str(model)!r}), env=CPU_ENV, log_dir={str(tmp_path)!r}).init()
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]) as owner:
        processes: list[psutil.Process] = []

        def has_started_its_own() -> bool:
            processes[:] = psutil.Process(owner.pid).children(recursive=True)
            return len(processes) >= 4  # the keeper, the server, a scheduler, a detokenizer

        try:
            wait_until(has_started_its_own, timeout_s=120)
        finally:
            owner.kill()
    wait_until(lambda: all(is_gone(process) for process in processes))


@pytest.mark.timeout(300)
def test_a_wrong_model_path_is_reported_with_the_exit_code_and_sglangs_own_words(tmp_path: Path) -> None:
    engine = SGLangEngine(cpu_server_args(tmp_path / "no-model"), env=CPU_ENV, log_dir=tmp_path)
    with pytest.raises(ServerStartError, match=r"exited with code 1(?s:.*)no-model") as error:
        engine.init()
    assert error.value.exit_code == 1
    assert not engine.health_generate()


def test_a_missing_sglang_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ModuleNotFoundError, match=r"sglang is not installed for .*pip install"):
        SGLangEngine(cpu_server_args("a-model")).init()


def test_the_engine_class_is_importable_without_sglang() -> None:
    script = (
        "import sys; sys.modules.update(sglang=None, torch=None, transformers=None); import enginefsm.rehearsal.sglang"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("server_args", "complaint"),
    [
        ({}, "no model_path"),
        ({"model_path": "a-model", "port": 30000}, r"give them to init\(\)"),
        ({"model_path": "a-model", "host": "0.0.0.0"}, r"give them to init\(\)"),
        ({"model_path": "a-model", "nnodes": 2}, "on one node, and server_args asks for 2"),
        ({"model_path": Path("a-model")}, "only what JSON can express"),
    ],
)
def test_server_args_that_cannot_work_are_refused(server_args: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SGLangEngine(server_args)
