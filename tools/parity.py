"""
Does this port compute what the record computes? Runs a reference case (batches, losses and parameters made by the record's own
maths) through the real loader, model, optimizers, schedule and replay, and compares.

    python tools/parity.py tests/data/parity/A_f32 [--devices 8] [--no_replay] [--json]

Prints one line per quantity with its worst error and the tolerance; exit code 0 only if all hold. Errors are relative.
"""
import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

class Report:
    """Worst error of each quantity."""
    def __init__(self):
        self.rows: dict[str, dict] = {}

    def add(self, quantity: str, error: float, tolerance: float, where: str):
        row = self.rows.setdefault(quantity, dict(error=-1.0, tolerance=tolerance, where="", checks=0, ok=True))
        row["checks"] += 1
        error = float("inf") if error != error else float(error)  # NaN is the worst
        row["ok"] &= error <= tolerance
        if error / (tolerance or 1e-30) > row["error"] / (row["tolerance"] or 1e-30):
            row.update(error=error, tolerance=tolerance, where=where)

    def __str__(self):
        return "\n".join(f"{'ok  ' if r['ok'] else 'FAIL'} {name:34} worst {r['error']:9.2e}  tolerance {r['tolerance']:7.0e}  "
                         f"{r['checks']:5} checks  {r['where']}" for name, r in self.rows.items())

def run_case(case: Path, replay: bool) -> tuple[Report, list]:
    """The comparison, on the devices that PJRT finds. Returns the report and the loss of each row at each step."""
    import numpy as np
    import torch

    import spmd
    import train_gpt_xla as port

    config = json.loads((case / "config.json").read_text())
    init, batches, expected = (dict(np.load(case / f"{name}.npz")) for name in ("init", "batches", "expected"))
    f32 = config["precision"] == "f32"
    known = {f.name for f in port.fields(port.Hyperparameters)}
    args = port.Hyperparameters(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known} | dict(
        dtype="float32" if f32 else "bfloat16", train_files=str(case / config["train_files"]), val_files=str(case / config["val_files"])))
    port.check_args(args)
    port.setup_devices(spmd.COMPILE_FAST)
    report = Report()
    # The tolerances that a correct port meets, as measured against a second run of the record's maths
    tol_loss, tol_late, tol_val = (1e-6, 1e-5, 1e-5) if f32 else (2e-3, 2e-3, 6e-3)
    tol_grad, tol_param = (1e-5, 5e-4) if f32 else (2e-2, 2e-2)

    def rel(a, b):
        return abs(a - b) / max(abs(b), 1e-30)

    def compare(kind, tag, name, x, tolerance):
        """x against the reference's norm, projection and, where it is there, every element."""
        x = x.detach().double().flatten()
        norm = expected[f"{tag}_norm/{name}"] if f"{tag}_norm/{name}" in expected else expected.get(f"{kind}norm/{tag}/{name}")
        proj = expected[f"{tag}_proj/{name}"] if f"{tag}_proj/{name}" in expected else expected.get(f"{kind}proj/{tag}/{name}")
        norm, where = float(norm), f"{tag} {name}"
        label = "gradient" if kind else "parameter"
        report.add(f"{label} norms", rel(x.norm().item(), norm), tolerance, where)
        if proj is not None:
            ours = (x * torch.arange(x.numel(), dtype=torch.float64).cos()).sum().item()
            # a sum of terms of both signs: an error of the elements by tolerance moves it by several times norm x tolerance
            report.add(f"{label} projections", abs(ours - float(proj)) / max(norm, 1e-30), 10 * tolerance, where)
        full = expected.get(f"{tag}/{name}", expected.get(f"grad/{tag}/{name}"))
        if full is not None:
            full = torch.from_numpy(np.asarray(full)).double().flatten()
            report.add(f"{label} elements", (x - full).norm().item() / max(norm, 1e-30), 10 * tolerance, where)

    manager = port.build(args, replay)
    model = manager.model
    model.load_state_dict({name: torch.from_numpy(value) for name, value in init.items()})
    state = model.state_dict()
    report.add("initial parameters", max((state[n].float() - torch.from_numpy(init[n]).to(state[n].dtype).float()).abs().max().item()
                                         for n in init), 0.0, "")
    manager.reset()

    def numbers():
        return port.to_device(manager.get_numbers())

    def check_batch(batch, key, where):
        for r in range(port.ROWS):
            for x, name in zip(batch, ("inputs", "targets", "cum_seqlens"), strict=True):
                want, got = batches[f"{key}/{r}/{name}"].astype(np.int64), x[r].astype(np.int64)
                differs = want.shape != got.shape or (want != got).any()
                report.add("batches", float(differs), 0.0, f"{where} row {r} {name}")
        return port.to_devices(port.pack(*batch))

    def gradients(batch):
        """Of this step alone: those that an even step leaves for the odd one are not in it."""
        graph, grads = manager.graph, {}
        manager.graph = dataclasses.replace(graph, adam=False)
        for rows in batch:  # in turn
            _, found = manager.backward(rows, numbers())
            found = {name: found[p] for name, p in model.named_parameters()}
            found = {name: port.shard(port.leave(grad).float().sum(0)) for name, grad in found.items() if grad is not None}
            port.xm.mark_step()
            grads = {name: grads.get(name, 0) + grad.cpu() for name, grad in found.items()}
        manager.graph = graph
        for i, block in enumerate(model.blocks):
            if block.attn is not None:
                grads[f"blocks.{i}.attn.qkvo_w"] = block.attn.to_upstream(grads[f"blocks.{i}.attn.qkvo_w"])
        return grads

    def check_schedule(step):
        s = {name.removeprefix("sched/"): value[step] for name, value in expected.items() if name.startswith("sched/")}
        mtp = port.get_mtp_weights(step, args)
        for name, ours in dict(step_lr=port.get_lr(step, args), muon_momentum=port.get_muon_momentum(step, args),
                               ws_short=manager.graph.ws_short, ws_long=manager.graph.ws_long,
                               batch_size=manager.graph.tokens * port.ROWS,
                               n_mtp=len(mtp), adam_active=manager.graph.adam, attn_scale=model.yarn.attn_scale).items():
            report.add("schedule", rel(float(ours), float(s[name])), 1e-12, f"step {step} {name}")
        report.add("schedule", max(abs(a - b) for a, b in zip((mtp + [0, 0])[:3], s["mtp"], strict=True)), 1e-7, f"step {step} mtp")

    def check_yarn(step):
        order = port.half_split(args.head_dim).argsort()
        for name, yarn in (("yarn", model.yarn), ("yarn_paired", model.yarn_paired_head)):
            tag = f"yarn/step{step}/{name}"
            if f"{tag}/angular_freq" not in expected:
                continue
            rows = int(expected[f"{tag}/factor1_shape"][0])
            freq = torch.tensor(yarn.numbers()[:-1])
            error = (yarn.angular_freq - torch.from_numpy(expected[f"{tag}/angular_freq"])).abs().max().item()
            report.add("YaRN frequencies", error, 1e-6, tag)
            for k, factor in enumerate(yarn.factors(rows, freq, getattr(torch, args.dtype)), start=1):
                factor = factor[..., order].float()
                if factor.ndim == 3:
                    factor = torch.cat([factor[0], factor[1]], dim=-1)  # upstream lays even and odd heads side by side
                # bfloat16: one rounding step of a number near 1
                tolerance = 1e-5 if f32 else 2 ** -8
                for part, ours in ((f"factor{k}_first32", factor[:32]), (f"factor{k}_last16", factor[-16:])):
                    error = (ours - torch.from_numpy(expected[f"{tag}/{part}"]).float()).abs().max().item()
                    report.add("YaRN tables", error, tolerance, f"{tag} {part}")

    train_rows, loader, kept = [], None, {}
    val_steps = {int(s): i for i, s in enumerate(expected["val_steps"])}
    for step in range(args.num_iterations + 1):
        if step in val_steps:
            i = val_steps[step]
            manager.advance_schedule(step, train=False)
            windows = (manager.graph.ws_short, manager.graph.ws_long)
            report.add("validation windows", float(windows != tuple(expected["val_ws_short_long"][i])), 0.0, f"step {step}")
            slices = port.distributed_data_generator(args.val_files, args.val_batch_size, -1, align_to_bos=False,
                                                     bos_id=config["bos_id"], vocab_size=args.vocab_size)
            n = args.val_tokens // args.val_batch_size
            losses = [port.to_rows(manager.run(check_batch(batch, f"val/{k}", f"val {k}"), numbers()))
                      for k, (batch, _) in zip(range(n), slices)]
            error = rel(torch.stack(losses).double().mean().item(), float(expected["val_loss_f32softcap"][i]))
            report.add("validation loss", error, tol_val, f"step {step}")
        if step == args.num_iterations:
            break
        manager.advance_schedule(step)
        check_schedule(step)
        check_yarn(step)
        send = (manager.graph.tokens * port.ROWS, args.train_max_seq_len)
        if loader is None:
            loader = port.distributed_data_generator(args.train_files, *send, bos_id=config["bos_id"], vocab_size=args.vocab_size)
        batch = check_batch((next(loader) if step == 0 else loader.send(send))[0], f"train/{step}", f"train {step}")
        if step < 2:
            for name, grad in gradients(batch).items():
                kept[name] = grad if step == 0 or dict(model.named_parameters())[name] not in manager.adam_opt.state else kept[name] + grad
                if float(expected.get(f"gradnorm/step{step}/{name}", -1)) >= 0:
                    compare("grad", f"step{step}", name, kept[name], tol_grad)
        train_rows.append(port.to_rows(manager.run(batch, numbers())).double().numpy())
        want = expected["train_loss_rows"][step]
        late = step > int(expected["split_step"])
        for r, (a, b) in enumerate(zip(train_rows[-1], want, strict=True)):
            report.add("losses after the split" if late else "losses to the split", rel(a, b), tol_late if late else tol_loss,
                       f"step {step} row {r}")
        tag = {0: "params_after_step0", 1: "params_after_step1", args.num_iterations - 1: "params_final"}.get(step)
        if tag:
            for name, x in model.state_dict().items():
                compare("", tag, name, x, tol_param)
    for name, p in model.named_parameters():
        if f"adam_final/{name}/step" in expected:
            state = manager.adam_opt.state[p]
            report.add("Adam step counts", float(state["step"] != int(expected[f"adam_final/{name}/step"])), 0.0, name)
            for key, ours in (("exp_avg_norm", spmd.to_host(state["exp_avg"]).double().norm()),
                              ("exp_avg_sq_sum", spmd.to_host(state["exp_avg_sq"]).double().sum())):
                error = rel(ours.item(), float(expected[f"adam_final/{name}/{key}"]))
                report.add("Adam moments", error, 1e-4 if f32 else 5e-2, f"{name} {key}")
    return report, [rows.tolist() for rows in train_rows]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("case", type=Path, help="folder with config.json, init.npz, batches.npz, expected.npz and the .bin shards")
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices: 1, 2, 4 or 8 (ignored on a TPU)")
    parser.add_argument("--no_replay", action="store_true", help="trace every step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    missing = [name for name in ("config.json", "init.npz", "batches.npz", "expected.npz") if not (options.case / name).is_file()]
    if missing:
        sys.exit(f"parity.py: {options.case} has no {missing[0]}: it is not a reference case (see tests/data/parity)")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ["CPU_NUM_DEVICES"] = str(options.devices)
    sys.path.insert(0, str(ROOT))
    try:
        report, losses = run_case(options.case.resolve(), not options.no_replay)
    except (ValueError, EOFError, OSError, KeyError) as e:
        sys.exit(f"parity.py: {options.case}: {e}")
    ok = all(row["ok"] for row in report.rows.values())
    if options.json:
        print(json.dumps(dict(case=options.case.name, devices=options.devices, ok=ok, quantities=report.rows, train_loss_rows=losses)))
    else:
        print(report)
        print(f"{options.case.name} on {options.devices} devices: {'passed' if ok else 'FAILED'}")
    sys.exit(0 if ok else 1)

if __name__ == "__main__":
    main()
