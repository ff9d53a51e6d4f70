"""What a real Slurm does to a sweep's jobs beside running them: it refuses, holds, forgets, falls silent and does not let go."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from fake_rooms import FAKE, Config, identity, write_question
from slurm_cluster import Cluster, missing, running
from test_ablation_runner import statuses, until
from test_ablation_store import quiet

from longcat_lab.ablation import driving, run, store
from longcat_lab.ablation.ends import CANCELLED
from longcat_lab.ablation.executors import Refused, slurm_task
from longcat_lab.ablation.executors import slurm as engine
from longcat_lab.ablation.executors.slurm_queue import Call
from longcat_lab.ablation.jobs import Job
from longcat_lab.ablation.resources import Resources
from longcat_lab.errors import LabError
from longcat_lab.files import read_json, write_json

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm") / "cluster") as found:
        yield found


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Another cluster: it takes eight jobs, and what follows a job on its node lasts as long as there is a file `hold`."""
    home = tmp_path_factory.mktemp("narrow") / "cluster"
    epilog = home.parent / "epilog"
    epilog.write_text(f"#!/bin/sh\nwhile [ -e {home.parent}/hold ]; do sleep 0.1; done\n")
    epilog.chmod(0o755)
    conf = slurm_cluster.CONF.replace("MessageTimeout=10", "MessageTimeout=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm_cluster, "CONF", f"{conf}MaxJobCount=8\nEpilog={epilog}\n")
        with running(home) as found:
            yield found
            (home.parent / "hold").unlink(missing_ok=True)


def executor(folder: Path, slurm: dict[str, object] | None = None, **more: object) -> engine.SlurmExecutor:
    return engine.SlurmExecutor(Resources(slurm=slurm or {}, **more), None, folder, look_every=0.2)  # type: ignore[arg-type]


def planned(folder: Path, name: str = "a", **config: object) -> Job:
    settings = Config(**config)  # type: ignore[arg-type]
    home, notebook = store.job_folder(folder, name, 0), folder.parent / "job.ipynb"
    job = Job("demo", name, 0, settings, identity(settings), {}, home, notebook)
    write_json(job.folder / "run.json", job.record())
    return job


def left(job: Job, slurm: Cluster, script: str, *options: str) -> str:
    """A job in the queue as an earlier driver has left it, but what runs there is `script`."""
    path = job.folder / f"script-{job.variant}.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    number = slurm.call("sbatch", "--parsable", "--output=/dev/null", *options, str(path))
    write_json(job.folder / store.ENGINE, {"script": path.name, "identity": job.identity, "attempts": 0, "slurm": number})
    return number


def queued(slurm: Cluster, number: str) -> str:
    """What the queue itself says of a job."""
    return slurm.call("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T")


def put(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that stands before Slurm's own one; `{real}` is that, `{calls}` the file of its calls."""
    real, place = shutil.which(name), folder / "bin"
    place.mkdir(exist_ok=True)
    (place / name).write_text(f'#!/bin/sh\necho "$*" >> {place}/{name}.calls\n' + text.format(real=real, calls=place / f"{name}.calls"))
    (place / name).chmod(0o755)
    if str(place) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place / f"{name}.calls"


LIMIT = """if [ $(wc -l < {calls}) -le 3 ]; then
    echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
    echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, size and/or time limits)" >&2
    exit 1
fi
exec {real} "$@"
"""


def test_a_sweep_waits_for_a_limit_of_submissions_and_says_what_is_held(
    tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, console, out = put(tmp_path, "sbatch", LIMIT, monkeypatch), quiet(), tmp_path / "out"
    monkeypatch.setattr(driving, "REFUSALS", (0.1,) * 9)

    def said() -> str:
        return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]

    def release() -> None:
        try:
            until(lambda: "a/seed-0: held in the queue (JobHeldUser)" in said(), 60)
        finally:
            slurm.call("scontrol", "release", read_json(out / "jobs/a/seed-0" / store.ENGINE)["slurm"])

    helper = threading.Thread(target=release)
    helper.start()
    run(write_question(tmp_path, {"a": {}}), out, rooms=FAKE, executor=executor(out, {"hold": True}), console=console)
    helper.join()
    assert statuses(out) == {"a/seed-0": "finished"} and len(calls.read_text().splitlines()) == 4
    assert "Slurm does not take a/seed-0 now: QOSMaxSubmitJobPerUserLimit. 0 jobs are there" in said()
    assert said().count("held in the queue") == 1
    assert not [path for path in (out / "slurm").glob("*.pkl") if not path.name[0].isdigit()] and not list((out / "slurm").glob(".*"))


def test_a_full_queue_refuses_for_now_and_an_impossible_job_for_good(
    tmp_path: Path, narrow: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", narrow.environment["SLURM_CONF"])
    for wish, said in (({"cards": 3}, "node configuration"), ({"cards": 1, "card": "tpu"}, "Invalid generic resource")):
        with pytest.raises(LabError, match=rf"^Slurm refuses a/seed-0: .*{said}") as error:
            executor(tmp_path / "never", **wish).submit(planned(tmp_path / "never"))
        assert not isinstance(error.value, Refused) and not read_json(planned(tmp_path / "never").folder / store.ENGINE)
    assert executor(tmp_path / "never", cards=2).cpus == 2
    fills, full = executor(tmp_path / "out", {"hold": True}), planned(tmp_path / "out", "full")
    handles = []
    with pytest.raises(Refused, match=r"^Slurm does not take job-\d/seed-0 now: Slurm temporarily unable to accept job\.$"):
        for index in range(12):
            handles.append(fills.submit(planned(tmp_path / "out", f"job-{index}")))
    with pytest.raises(Refused):
        fills.submit(full)
    for handle in handles:
        handle.stop()
    until(lambda: all([handle.poll() is not None for handle in handles]), 60)
    # Ended jobs fill the queue too, until it forgets them.
    narrow.stop("slurmctld")
    narrow.start("slurmctld", "-D", "-c", "-f", str(narrow.home / "slurm.conf"))
    until(lambda: narrow.call("sinfo", "-h", "-p", "low", "-o", "%T") == "idle", 60)


def test_hundreds_of_jobs_are_asked_for_and_stopped_at_once_and_held_ones_are_named(
    tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "out", [f"arm-{index}" for index in range(12)]
    first = executor(out, {"hold": True})
    before = {name: first.submit(planned(out, name)).number for name in names}
    questions, stops = (put(tmp_path, name, 'exec {real} "$@"\n', monkeypatch) for name in ("squeue", "scancel"))
    second = executor(out)
    handles = [second.submit(planned(out, name)) for name in names]
    assert [handle.number for handle in handles] == list(before.values()) and {handle.attempts for handle in handles} == {0}
    assert len(questions.read_text().splitlines()) == 1 and all(handle.waits() for handle in handles)
    said = until(lambda: [handle.poll() for handle in handles] and second.told())
    assert (
        len(said) == 1 and said[0].startswith("arm-0/seed-0, arm-1/seed-0,") and " and 7 more: held in the queue (JobHeldUser)" in said[0]
    )
    assert f"scontrol release {','.join(before.values())}" in said[0]
    asked = len(questions.read_text().splitlines())
    until(lambda: [handle.poll() for handle in handles] and len(questions.read_text().splitlines()) > asked + 1)
    assert not second.told(), "each is named once"
    for handle in handles:
        handle.stop()
    until(lambda: all([handle.poll() is not None for handle in handles]), 60)
    sent = stops.read_text().splitlines()
    assert 1 <= len(sent) <= 2 and sent[0].split() == ["--state=PENDING", *before.values()]
    assert not second.queue.states and not second.names and handles[0].why().kind == CANCELLED  # type: ignore[union-attr]
    second.close()


def test_a_job_of_a_stranger_is_neither_followed_nor_stopped(tmp_path: Path, slurm: Cluster) -> None:
    ours, out = planned(tmp_path / "out"), tmp_path / "out"
    strange = left(ours, slurm, "sleep 300")
    note = read_json(ours.folder / store.ENGINE)
    write_json(ours.folder / store.ENGINE, {**note, "script": "of-another-cluster.sh", "identity": "changed since"})
    queue = executor(out, {"hold": True})
    handle = queue.submit(ours)
    assert handle.number != strange and handle.attempts is None
    handle.stop(force=True)
    until(lambda: handle.poll() is not None)
    assert queued(slurm, strange) in ("PENDING", "RUNNING")
    slurm.call("scancel", strange)


SILENT = """if [ $(wc -l < {calls}) -le 2 ]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
exec {real} "$@"
"""


def test_a_job_whose_slot_ends_asks_again_for_another_where_the_queue_did_not_answer(
    tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = left(planned(tmp_path / "out"), slurm, "sleep 300")
    until(lambda: queued(slurm, number) == "RUNNING")
    calls = put(tmp_path, "squeue", SILENT, monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", number)
    with pytest.raises(SystemExit):
        slurm_task.Task([], {}, "", "", grace=-120).again()
    assert len(calls.read_text().splitlines()) == 3 and "Restarts=1" in slurm.call("scontrol", "show", "job", number)
    slurm.call("scancel", number)


def test_a_job_that_its_partition_cannot_run_is_named(tmp_path: Path, slurm: Cluster) -> None:
    queue = executor(tmp_path / "out", cores=99)
    handle = queue.submit(planned(tmp_path / "out"))
    said = "a/seed-0: not started by the queue as they are (PartitionConfig). Stop the sweep and correct `resources` of the question."
    assert until(lambda: handle.poll() is None and queue.told()) == [said]
    handle.stop(force=True)
    until(lambda: handle.poll() is not None)


def test_a_job_of_another_configuration_ends_before_the_new_one_begins(
    tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = planned(tmp_path / "out")
    old = left(job, slurm, "sleep 300")
    until(lambda: queued(slurm, old) == "RUNNING")
    queue, changed = executor(tmp_path / "out", {"hold": True}), planned(tmp_path / "out", effect=0.5)
    put(tmp_path, "sbatch", LIMIT, monkeypatch)
    for _ in range(3):
        with pytest.raises(Refused):
            queue.submit(changed)
    handle = queue.submit(changed)
    assert f"afterany:{old}" in slurm.call("scontrol", "show", "job", handle.number)
    until(lambda: handle.poll() is None and queued(slurm, old) == "CANCELLED")
    handle.stop(force=True)
    until(lambda: handle.poll() is not None)


def test_a_record_that_a_disk_shows_late_is_waited_for(tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [planned(tmp_path / "out", name) for name in ("a", "b")]
    for job in jobs:
        left(job, slurm, "exit 0")
    queue = executor(tmp_path / "out")
    handles = [queue._follow(job, read_json(job.folder / store.ENGINE), "PENDING", 0) for job in jobs]
    until(lambda: [handle.poll() for handle in handles] and all(handle.state.name == "COMPLETED" for handle in handles))
    assert [handle.poll() for handle in handles] == [None, None], "over by the queue's word, and not by its own"
    write_json(jobs[0].folder / "run.json", {**jobs[0].record(), "status": "finished"})
    assert until(lambda: handles[0].poll() is not None) and handles[0].poll() == 0
    assert handles[1].poll() is None
    monkeypatch.setattr(engine, "SHOWS", 0.0)
    assert until(lambda: handles[1].poll() is not None) and handles[1].poll() == 0 and not queue.queue.states


def test_a_node_that_does_not_let_a_job_end_holds_up_neither_a_result_nor_a_stop(
    tmp_path: Path, narrow: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", narrow.environment["SLURM_CONF"])
    (narrow.home.parent / "hold").touch()
    jobs = [planned(tmp_path / "out", name) for name in ("a", "b")]
    numbers = [left(job, narrow, "exit 0") for job in jobs]
    queue = executor(tmp_path / "out")
    handles = [queue._follow(job, read_json(job.folder / store.ENGINE), "PENDING", 0) for job in jobs]
    until(lambda: [handle.poll() for handle in handles] == [None, None] and all(h.state.name == "COMPLETING" for h in handles))
    write_json(jobs[0].folder / "run.json", {**jobs[0].record(), "status": "finished"})
    assert until(lambda: handles[0].poll() is not None) and handles[0].poll() == 0
    assert handles[1].poll() is None, "it may be on its way into the queue again"
    handles[1].stop(force=True)
    assert until(lambda: handles[1].poll() is not None) and handles[1].why().kind == CANCELLED  # type: ignore[union-attr]
    assert [queued(narrow, number) for number in numbers] == ["COMPLETING"] * 2
    (narrow.home.parent / "hold").unlink()
    until(lambda: all(queued(narrow, number) == "COMPLETED" for number in numbers))
    queue.close()


def test_a_queue_that_does_not_answer_holds_nothing_up_and_what_it_took_unheard_is_not_there_twice(
    tmp_path: Path, narrow: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", narrow.environment["SLURM_CONF"])
    job, other = (planned(tmp_path / "out", name) for name in ("a", "b"))
    queue = executor(tmp_path / "out", {"hold": True})
    handle, calls = queue.submit(job), []
    monkeypatch.setattr("longcat_lab.ablation.executors.slurm_queue.Call", lambda *command: calls.append(Call(*command)) or calls[-1])
    narrow.daemons["slurmctld"].send_signal(signal.SIGSTOP)
    try:
        until(lambda: handle.poll() is None and calls)
        assert not calls[0].over() and handle.poll() is None, "it goes on while the question is on its way"
        until(lambda: handle.poll() is None and queue.queue._quiet_until)
        handle.stop(force=True)
        until(lambda: handle.poll() is None and calls[-1].command[0] == "scancel" and queue.queue._call is None)
        assert handle.poll() is None and handle.state.name == "PENDING"
        monkeypatch.setattr("longcat_lab.ablation.executors.slurm_queue.LONGEST", 3.0)
        with pytest.raises(Refused, match=r"^Slurm does not take b/seed-0 now: .*timed out"):
            queue.submit(other)
        with pytest.raises(Refused, match=r"^Slurm does not say which jobs are in its queue: .*timed out"):
            queue.submit(other)
    finally:
        narrow.daemons["slurmctld"].send_signal(signal.SIGCONT)
    assert until(lambda: handle.poll() is not None) and handle.why().kind == CANCELLED  # type: ignore[union-attr]
    there = until(
        lambda: narrow.call("squeue", "--noheader", "--states=PENDING", "--format=%i")
    )  # sbatch was ended, and its job is there all the same
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_CONF", narrow.environment["SLURM_CONF"])
    second = queue.submit(other)
    assert second.number != there and until(lambda: second.poll() is None and queued(narrow, there) == "CANCELLED")
    second.stop(force=True)
    assert until(lambda: second.poll() is not None) and not queue.queue.states
    queue.close()
