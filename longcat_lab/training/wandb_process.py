"""One run's folder mirrored into Weights and Biases: `python -P wandb_process.py FOLDER MODE PROJECT SECONDS SITTING`, a process of its
own.

The run's process never calls the client, so nothing there can stop or slow it. This one reads what the run writes anyway (run.json,
metrics.jsonl, the executed notebook) and starts without torch: only the standard library and the client are imported here. Its
standard input ends when the sitting is over or the run's process is gone; SECONDS after all is there to be logged it ends, whatever
hangs. How it went stands in FOLDER/wandb/state.json.
"""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path

LOOK = 0.5  # seconds between looks at the folder


def read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class State:
    """FOLDER/wandb/state.json: the run's id there, kept over all sittings, and how far this process is; left alone once a later sitting
    has begun."""

    def __init__(self, folder, sitting):
        self.path, self.sitting = folder / "wandb" / "state.json", sitting
        self.content = read(self.path) | {"pid": os.getpid()}

    def is_ours(self):
        return read(self.path).get("sitting") == self.sitting

    def say(self, state, reason=None):
        if not self.is_ours():
            return
        self.content |= {"state": state, "reason": reason}
        part = self.path.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps(self.content), encoding="utf-8")
        part.replace(self.path)


class Watch(threading.Thread):
    """Knows when the sitting is over, when the notebook around it is written, and when it has taken too long; the main thread may hang."""

    def __init__(self, folder, record, state, limit):
        super().__init__(daemon=True)
        self.folder, self.state, self.job, self.limit = folder, state, record.get("job"), limit
        self.over, self.written = threading.Event(), threading.Event()

    def run(self):
        sys.stdin.buffer.read()
        self.over.set()
        while self.job is not None and not self._job_ended():
            time.sleep(LOOK)
        self.written.set()
        time.sleep(self.limit)
        self.state.say("off", f"not finished after {self.limit:g} s")
        os._exit(1)

    def _job_ended(self):
        """The job of a sweep adds its seconds to run.json when its notebook is written; a dead one has let go of its lock."""
        if read(self.folder / "run.json").get("job", {}).get("seconds") != self.job.get("seconds"):
            return True
        try:
            with open(self.folder / ".lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


def begin(wandb, folder, mode, project, record, state):
    """The client's run: what is trained as its configuration, a sweep as its group, a variant as its job type."""
    for name in ("DATA", "CACHE"):  # what belongs to the run stays in its folder
        os.environ.setdefault(f"WANDB_{name}_DIR", str(folder / "wandb"))
    offline = mode == "offline"
    settings = {"silent": True, "console": "off", "disable_git": True, "disable_code": True, "x_disable_meta": True}
    settings |= {"x_save_requirements": False, "x_disable_stats": offline, "x_stats_pid": os.getppid()}
    settings |= {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": 30}
    job = {"group": record["sweep"], "job_type": record["variant"]} if "sweep" in record else {}
    return wandb.init(
        project=project,
        id=state.content["id"],
        name=f"{record['variant']}/seed-{record['seed']}" if job else folder.name,
        dir=str(folder),
        mode=mode,
        resume=None if offline else "allow",
        config={**record["config"], **{key: record[key] for key in ("identity", "provenance", "budget") if key in record}},
        settings=wandb.Settings(**settings),
        **job,
    )


def follow(run, path, over):
    """Logs each whole line of metrics.jsonl, old ones too, until the sitting is over."""
    place, done = 0, False
    while not done:
        done = over.wait(LOOK)
        if not path.exists():
            continue
        with open(path, "rb") as file:
            file.seek(place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        place += len(whole)
        for line in whole.splitlines():
            row = json.loads(line)
            if row["step"] >= run.step:  # a resumed run has the rows before
                run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])


def end(wandb, run, folder, watch):
    """Summary, then the executed notebook as an artifact if the run is the job of a sweep."""
    record = read(folder / "run.json")
    said = {"status": record.get("status"), "reason": record.get("reason"), "not_engaged": record.get("not_engaged")}
    run.summary.update({**said, **record.get("final", {}), **record.get("timings", {})})
    watch.written.wait()
    notebook = folder / "notebook.ipynb"
    if notebook.is_file():
        artifact = wandb.Artifact(f"notebook-{run.id}", "notebook")
        artifact.add_file(str(notebook))
        run.log_artifact(artifact)
    place = Path(run.dir).parent
    run.finish(exit_code=0 if record.get("status") in ("finished", "interrupted") else 1)
    for older in (folder / "wandb").glob("offline-run-*"):  # of sittings before: this one holds their rows too
        if older != place:
            shutil.rmtree(older, ignore_errors=True)


def main():
    folder, mode, project, limit = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
    os.nice(5)
    record = read(folder / "run.json")
    state = State(folder, sys.argv[5])
    state.say("starting")
    watch = Watch(folder, record, state, limit)
    watch.start()
    with open(folder / "wandb" / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the sitting before may still be handed over, and the client's run is the same one
        if state.is_ours():  # else a later sitting's process logs the rows of this one too
            hand_over(folder, mode, project, record, state, watch)


def hand_over(folder, mode, project, record, state, watch):
    try:
        import wandb

        run = begin(wandb, folder, mode, project, record, state)
        state.say("logging")
        follow(run, folder / "metrics.jsonl", watch.over)
        end(wandb, run, folder, watch)
        state.say("finished")
    except BaseException as error:
        lines = str(error).strip().splitlines()
        state.say("off", f"{type(error).__name__}: {lines[0] if lines else ''}")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not through the client's own last words, which may wait for a server


if __name__ == "__main__":
    main()
