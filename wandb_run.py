"""
A run's figures for Weights & Biases, by its own client (requirements-wandb.txt), which is imported only for --wandb.

Without a login, or where the server does not answer, figures go to a folder that `wandb sync` sends later. Nothing that goes wrong here
ends a training run. A run that goes on keeps its id (it is in the checkpoint) and with it its curves: steps that were sent before a
kill are the same the second time, and wandb leaves them out.
"""
import os
import re
import uuid


def get_client():
    try:
        import wandb
    except ImportError as e:
        raise ValueError(f"--wandb needs the client of Weights & Biases ({e}): 'pip install -r requirements-wandb.txt', or leave out "
                         "--wandb") from None
    return wandb

class WandbRun:
    """say: where to tell what happens. id: that of the run which goes on, None for a new one. ValueError where there is no client."""
    def __init__(self, project: str, run_id: str, config: dict, say, id: str | None = None):
        wandb = get_client()
        self.say, self.id = say, id or f"{re.sub(r'[^A-Za-z0-9_.-]', '_', run_id)[:100]}-{uuid.uuid4().hex[:8]}"
        def init(mode: str | None):
            return wandb.init(project=project, id=self.id, name=run_id, config=config, dir="logs", mode=mode,
                              resume="allow" if mode == "online" else None, settings=settings)
        why = "WANDB_MODE is set" if os.environ.get("WANDB_MODE") else "no login: see 'wandb login'"
        try:
            settings = wandb.Settings(silent=True, console="off", init_timeout=60, finish_timeout=60)
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
            self.run = init(mode)
        except Exception as e:  # the client and its HTTP library raise what they like
            why = " ".join(str(e).split())[:200]
            try:
                self.run = init("offline")
            except Exception:
                raise ValueError(f"--wandb {project}: {why}") from None
        if self.run.offline:
            folder = os.path.dirname(self.run.dir)
            self.say(f"wandb: recorded in {folder} ({why}); 'wandb sync {folder}' sends it later")
        elif self.run.url:
            self.say(f"wandb: {self.run.url}")

    def log(self, step: int, **numbers: float):
        self._try(lambda: self.run.log(numbers, step=step))

    def finish(self, exit_code: int = 0):
        """Waits until all is sent, a minute at most: what is not stays on the disk."""
        self._try(lambda: self.run.finish(exit_code))

    def _try(self, call):
        if self.run is None:
            return
        try:
            call()
        except Exception as e:
            self.run = None
            self.say(f"wandb failed ({' '.join(str(e).split())[:200]}); training goes on without it")
