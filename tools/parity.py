"""
Does this port compute what the record computes? Runs a reference case (batches, losses and parameters made by the record's own
maths) through the real loader, model, optimizers, schedule and replay, and compares.

    python tools/parity.py tests/data/parity/A_f32 [--devices 8] [--no_replay] [--json]

Prints one line per quantity with its worst error and the tolerance; exit code 0 only if all hold. Errors of norms, sums and losses are
relative, those of projections and elements relative to the norm. Tolerances are the case's own (config.json); what it has none for is
not compared.
"""
import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

class Report:
    """Worst error of each quantity."""
    def __init__(self):
        self.rows: dict[str, dict] = {}
        self.undecided: dict[str, list[int]] = {}  # elements left out (see run_case), and all that the parameter has

    def add(self, quantity: str, error: float, tolerance: float, where: str):
        row = self.rows.setdefault(quantity, dict(error=-1.0, tolerance=tolerance, where="", checks=0, failed=0, ok=True))
        row["checks"] += 1
        error = float("inf") if error != error else float(error)  # NaN is the worst
        row["failed"] += error > tolerance
        row["ok"] = not row["failed"]
        if error / (tolerance or 1e-30) > row["error"] / (row["tolerance"] or 1e-30):
            row.update(error=error, tolerance=tolerance, where=where)

    def __str__(self):
        lines = [f"{'ok  ' if r['ok'] else 'FAIL'} {name:34} worst {r['error']:9.2e}  tolerance {r['tolerance']:7.0e}  "
                 f"{r['checks']:5} checks  {r['where']}" for name, r in self.rows.items()]
        undecided = ", ".join(f"{name} {n} of {of}" for name, (n, of) in self.undecided.items() if n)
        return "\n".join(lines + [f"undecided, left out: {undecided or 'none'}"])

def failures(report: "Report | dict") -> list[dict]:
    """The quantities that are not ok, from a report or from what --json prints."""
    rows = report.rows if isinstance(report, Report) else report["quantities"]
    return [dict(quantity=name, error=row["error"], tolerance=row["tolerance"], where=row["where"],
                 failed=f"{row['failed']} of {row['checks']}") for name, row in rows.items() if not row["ok"]]

def run_case(case: Path, replay: bool, steps: int | None = None) -> tuple[Report, list]:
    """The comparison, on the devices that PJRT finds. Returns the report and the loss of each row at each step."""
    import numpy as np
    import torch

    import spmd
    import train_gpt_xla as port

    config = json.loads((case / "config.json").read_text())
    init, batches, expected = (dict(np.load(case / f"{name}.npz")) for name in ("init", "batches", "expected"))
    f32, tol = config["precision"] == "f32", config["tolerances"]
    port.TRAINING_STAGES[:] = [port.TrainingStage(**stage | dict(window_sizes=tuple(stage["window_sizes"]))) for stage in config["stages"]]
    known = {f.name for f in dataclasses.fields(port.Hyperparameters)}
    # these are the stages' own
    known -= {"train_bs_schedule", "train_max_seq_len_schedule", "ws_short_schedule", "ws_long_schedule"}
    args = port.Hyperparameters(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known} | dict(
        dtype="float32" if f32 else "bfloat16", train_files=str(case / config["train_files"]), val_files=str(case / config["val_files"])))
    momentum_steps = {k: config[k] for k in ("muon_warmup_steps", "muon_cooldown_steps") if k not in known}
    if momentum_steps:
        # the manager finds it by its name too
        port.get_muon_momentum = functools.partial(port.get_muon_momentum, **momentum_steps)
    port.check_args(args)
    port.setup_devices(spmd.COMPILE_FAST)
    report = Report()
    stop = args.num_iterations if steps is None else min(steps, args.num_iterations)

    def rel(a, b):
        return abs(a - b) / max(abs(b), 1e-30)

    def check(quantity, error, tolerance, where, room=0.0):
        """tolerance: its name in the case, or a number."""
        tolerance = tol.get(tolerance) if isinstance(tolerance, str) else tolerance
        if tolerance is not None:
            report.add(quantity, error, tolerance + room, where)

    def compare(label, tag, name, x, undecided=None, move=0.0):
        """
        x, in upstream's layout, against the reference's norm, projection, those of each of its matrices and every element: what it has of
        them. undecided: the elements that rounding may have moved by `move`. They are the reference's own where it has them, and have
        room where not.
        """
        gradient = label == "gradient"

        def reference(part):
            return expected.get(f"grad{part}/{tag}/{name}" if gradient else f"{tag}_{part}/{name}" if part else f"{tag}/{name}")

        if reference("norm") is None:
            return
        short, where = "grad" if gradient else "param_", f"{tag} {name}"
        norm_tolerance = tol.get("gradnorm_exceptions", {}).get(name, f"{short}norm") if gradient else "param_norm"
        x = x.detach().double().flatten().clone()
        room = torch.zeros_like(x) if undecided is None else move * undecided.flatten().double()
        full = reference("")
        if full is not None:
            full = torch.from_numpy(np.asarray(full)).double().flatten()
            x[room > 0], room = full[room > 0], torch.zeros_like(x)
            when = "" if gradient else ", final" if tag == "params_final" else ", early"
            tolerance = "grad_elements" if gradient else f"param_elements_{when[2:]}"
            check(f"{label} elements{when}", (x - full).norm().item() / max(full.norm().item(), 1e-30), tolerance, where)

        def numbers_of(x, room, norm, proj, norm_tolerance, of, where):
            norm, cos = float(norm), torch.arange(x.numel(), dtype=torch.float64).cos()
            moved = (room * (2 * x.abs() + room)).sum().item() / 2 / max(norm, 1e-30) ** 2
            check(f"{label} norms{of}", rel(x.norm().item(), norm), norm_tolerance, where, moved)
            moved = (room * cos.abs()).sum().item() / max(norm, 1e-30)
            check(f"{label} projections{of}", abs((x * cos).sum().item() - float(proj)) / max(norm, 1e-30), f"{short}proj", where, moved)

        numbers_of(x, room, reference("norm"), reference("proj"), norm_tolerance, "", where)
        if reference("norms") is not None:  # a bank's matrices, the value tables
            norms, projs = reference("norms"), reference("projs")
            for i, part in enumerate(zip(x.chunk(len(norms)), room.chunk(len(norms)), norms, projs, strict=True)):
                numbers_of(*part, f"{short}norm_matrix", " of matrices", f"{where} {i}")

    manager = port.build(args, replay)
    model, schedule = manager.model, manager.training_schedule
    model.load_state_dict({name: torch.from_numpy(value) for name, value in init.items() if name != "prefix_table"})
    model.set_prefix_table(torch.from_numpy(init["prefix_table"]))
    state = model.state_dict()
    for name, value in init.items():
        if name != "prefix_table":
            x, value = state[name].float(), torch.from_numpy(value)
            same = x.numel() == value.numel() and (x.flatten() == value.to(state[name].dtype).float().flatten()).all()
            check("initial parameters", float(not same), 0.0, name)
    manager.reset()
    parameters = dict(model.named_parameters())
    optim = {name: manager.optimizer.param_cfgs[p].optim for name, p in parameters.items()}

    def numbers():
        return port.to_device(manager.get_numbers())

    def check_batch(batch, key, where):
        for x, name in zip(batch, ("inputs", "targets", "cum_seqlens", "bigram_inputs"), strict=True):
            for r in range(port.ROWS):
                want, got = batches[f"{key}/{r}/{name}"].astype(np.int64), x[r].astype(np.int64)
                differs = want.shape != got.shape or (want != got).any()
                check("batches", float(differs), 0.0, f"{where} row {r} {name}")
        return port.to_devices(port.pack(*batch, args.bigram_vocab_size))

    def gradients(batch):
        """Of this step alone, in upstream's layout: those that an even step leaves for the odd one are not in it."""
        graph, grads = manager.graph, {}
        manager.graph = dataclasses.replace(graph, adam=False)
        for rows in batch:  # in turn
            spmd.begin_program()
            _, found = manager.backward(rows, numbers())
            found = {name: (p, found.get(p)) for name, p in parameters.items()}
            found = {name: port.shard(manager.optimizer.leave_gradient(p, grad)) for name, (p, grad) in found.items() if grad is not None}
            port.xm.mark_step()
            grads = {name: grads.get(name, 0) + grad.cpu() for name, grad in found.items()}
        manager.graph = graph
        return {name: model.to_upstream(name, grad.reshape(parameters[name].shape)) for name, grad in grads.items()}

    def check_schedule(step):
        graph, mtp = manager.graph, list(schedule.mtp_weights[step])
        prefix = float(schedule.prefix_weights[step])
        exact = dict(step_lr=schedule.get_lr(step), muon_momentum=port.get_muon_momentum(step, args), ws_short=graph.ws_short,
                     ws_long=graph.ws_long, batch_size=graph.tokens * port.ROWS, max_seq_len=max_seq_len(step), n_mtp=graph.n_mtp,
                     adam_active=graph.adam, attn_scale=model.yarn.attn_scale)
        rounded = dict(mtp=mtp + [0.0] * (3 - len(mtp)), prefix_weight=[prefix])  # float32 in the reference
        for key in (key for key in expected if key.startswith("sched/")):
            name, want = key.removeprefix("sched/"), expected[key][step]
            if name in rounded:
                error = max(abs(a - float(b)) for a, b in zip(rounded[name], np.atleast_1d(want), strict=True))
                check("schedule", error, 1e-7, f"step {step} {name}")
            else:
                check("schedule", rel(float(exact[name]), float(want)), 1e-12, f"step {step} {name}")
        check("schedule", float(graph.prefix != (prefix > 0)), 0.0, f"step {step}: the graph's prefix")

    def max_seq_len(step):
        stage = next(i for i, (_, end) in enumerate(schedule.boundaries) if step < end)
        return args.train_max_seq_len_schedule[stage]

    def check_yarn(step):
        order = port.half_split(args.head_dim).argsort()
        for name, yarn in (("yarn", model.yarn), ("yarn_paired", model.yarn_paired_head)):
            tag = f"yarn/step{step}/{name}"
            if f"{tag}/angular_freq" not in expected:
                continue
            freq = torch.tensor(yarn.numbers()[:-1])
            error = (yarn.angular_freq - torch.from_numpy(expected[f"{tag}/angular_freq"])).abs().max().item()
            check("YaRN frequencies", error, 1e-6, tag)
            check("YaRN scales", rel(yarn.attn_scale, float(expected[f"{tag}/attn_scale"])), 1e-12, tag)
            rows = int(expected[f"{tag}/factor1_shape"][0])
            for k, factor in enumerate(yarn.factors(rows, freq, getattr(torch, args.dtype)), start=1):
                factor = factor[..., order].float()
                if factor.ndim == 3:
                    factor = torch.cat([factor[0], factor[1]], dim=-1)  # upstream lays even and odd heads side by side
                shape = tuple(expected[f"{tag}/factor{k}_shape"])
                check("YaRN tables", float(tuple(factor.shape) != shape), 0.0, f"{tag} factor{k}: {tuple(factor.shape)}")
                # bfloat16: one rounding step of a number near 1
                tolerance = 1e-5 if f32 else 2 ** -8
                for part, ours in ((f"factor{k}_first32", factor[:32]), (f"factor{k}_last16", factor[-16:])):
                    error = (ours - torch.from_numpy(expected[f"{tag}/{part}"]).float()).abs().max().item()
                    check("YaRN tables", error, tolerance, f"{tag} {part}")
                # of all rows: a mean error
                error = abs(factor.double().sum().item() - float(expected[f"{tag}/factor{k}_sum"])) / factor.numel()
                check("YaRN tables", error, tolerance / 10, f"{tag} factor{k}_sum")

    # Adam's first step moves an element by its learning rate, where its gradient points to. Where that is almost 0, but not 0, rounding
    # decides which way; such elements are left out from then on
    undecided, move = {}, {}

    def find_undecided(kept):
        lr = config["adam"]["lr"] * float(expected["sched/step_lr"][1])
        for name, grad in kept.items():
            if optim[name] == "adam":
                grad = grad.double()
                undecided[name] = (grad != 0) & (grad.abs() < 1e-5 * grad.square().mean().sqrt())
                move[name] = 2.1 * lr * config["lr_mul"][name]  # there instead of here; decay is the rest
                report.undecided[name] = [int(undecided[name].sum()), grad.numel()]
        if "embed.weight" not in undecided:  # tied: it is lm_head's copy
            undecided["embed.weight"], move["embed.weight"] = undecided["lm_head.weight"].T, move["lm_head.weight"]

    def check_parameters(tag):
        for name, x in model.state_dict().items():
            late = tag != "params_after_step0" and name in undecided
            compare("parameter", tag, name, x, *((undecided[name], move[name]) if late else ()))

    check("schedule", float([list(map(int, b)) for b in schedule.boundaries] != config["stage_boundaries"]), 0.0, "boundaries")
    split_step = int(expected["split_step"])
    check("schedule", float(schedule.split_step != split_step), 0.0, "split step")
    data = dict(bos_id=config["bos_id"], vocab_size=args.vocab_size, bigram_vocab_size=args.bigram_vocab_size,
                max_num_docs={int(length): listed for length, listed in config["train_max_num_docs"].items()})
    train_rows, loader, kept = [], None, {}
    val_steps = {int(s): i for i, s in enumerate(expected["val_steps"])}
    for step in range(args.num_iterations + 1):
        if step == stop < args.num_iterations:
            break
        if step in val_steps:
            i = val_steps[step]
            manager.advance_schedule(step, train=False)
            windows = (manager.graph.ws_short, manager.graph.ws_long)
            check("validation windows", float(windows != tuple(expected["val_ws_short_long"][i])), 0.0, f"step {step}: {windows}")
            slices = port.distributed_data_generator(args.val_files, args.val_batch_size, -1, align_to_bos=False, **data)
            n = args.val_tokens // args.val_batch_size
            losses = [port.to_rows(manager.run(check_batch(batch, f"val/{k}", f"val {k}"), numbers()))
                      for k, (batch, _) in zip(range(n), slices)]
            error = rel(torch.stack(losses).double().mean().item(), float(expected["val_loss_f32softcap"][i]))
            check("validation loss", error, "val", f"step {step}")
        if step == args.num_iterations:
            break
        manager.advance_schedule(step)
        check_schedule(step)
        check_yarn(step)
        send = (manager.graph.tokens * port.ROWS, max_seq_len(step))
        if loader is None:
            loader = port.distributed_data_generator(args.train_files, *send, **data)
        batch = check_batch((next(loader) if step == 0 else loader.send(send))[0], f"train/{step}", f"train {step}")
        if step < 2:
            for name, grad in gradients(batch).items():
                # Adam's of step 1 is on top of step 0's
                kept[name] = kept[name] + grad if step == 1 and optim[name] == "adam" else grad
                # tied, lm_head has embed's too
                compare("gradient", f"step{step}", "lm_head+embed" if name == "lm_head.weight" else name, kept[name])
            if step == 1:
                find_undecided(kept)
        train_rows.append(port.to_rows(manager.run(batch, numbers())).double().numpy())
        # Adam has not moved anything before step 2
        quantity, when = (("before Adam", "before_adam") if step < 2 else ("to the split", "to_split") if step <= split_step
                          else ("after the split", "after"))
        for r, (a, b) in enumerate(zip(train_rows[-1], expected["train_loss_rows"][step], strict=True)):
            check(f"losses {quantity}", rel(a, b), f"losses_{when}", f"step {step} row {r}")
        error = rel(train_rows[-1].sum(), float(expected["train_loss_sum"][step]))
        check(f"loss sums {quantity}", error, "losses_before_adam" if step < 2 else f"loss_sum_{when}", f"step {step}")
        for tag, at in (("params_after_step0", 0), ("params_after_step1", 1), ("params_after_split", split_step),
                        ("params_final", args.num_iterations - 1)):
            if step == at:
                check_parameters(tag)
    if stop < args.num_iterations:
        return report, [rows.tolist() for rows in train_rows]

    for name, p in parameters.items():
        state, kind = manager.optimizer.param_states[p], "adam_final" if optim[name] == "adam" else "normuon_final"
        want = {key.rpartition("/")[2]: expected[key] for key in expected if key.rpartition("/")[0] == f"{kind}/{name}"}
        if kind == "adam_final":
            check("Adam step counts", float(int(state["step"]) != int(want["step"])), 0.0, f"{name}: {int(state['step'])}")
            ours = dict(exp_avg_norm=spmd.to_host(state["exp_avg"]).double().norm(),
                        exp_avg_sq_sum=spmd.to_host(state["exp_avg_sq"]).double().sum())
            quantity, tolerance = "Adam moments", "adam_moments"
        else:
            second = spmd.to_host(state["second_momentum_buffer"]).double()
            shape = tuple(second.shape)
            check("NorMuon shapes", float(shape != tuple(want["second_momentum_shape"])), 0.0, f"{name}: {shape}")
            ours = dict(momentum_norm=spmd.to_host(state["momentum_buffer"]).double().norm(), second_momentum_sum=second.sum())
            quantity, tolerance = "NorMuon moments", "normuon_moments"
        for key, value in ours.items():
            check(quantity, rel(value.item(), float(want[key])), tolerance, f"{name} {key}")
    return report, [rows.tolist() for rows in train_rows]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("case", type=Path, help="folder with config.json, init.npz, batches.npz, expected.npz and the .bin shards")
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices: 1, 2, 4 or 8 (ignored on a TPU)")
    parser.add_argument("--no_replay", action="store_true", help="trace every step")
    parser.add_argument("--steps", type=int, help="stop after this many training steps; fewer than the case's: nothing final is compared")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    missing = [name for name in ("config.json", "init.npz", "batches.npz", "expected.npz") if not (options.case / name).is_file()]
    if missing:
        sys.exit(f"parity.py: {options.case} has no {missing[0]}: it is not a reference case (see tests/data/parity)")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ["CPU_NUM_DEVICES"] = str(options.devices)
    sys.path.insert(0, str(ROOT))
    try:
        report, losses = run_case(options.case.resolve(), not options.no_replay, options.steps)
    except (ValueError, EOFError, OSError, KeyError) as e:
        sys.exit(f"parity.py: {options.case}: {e}")
    ok = not failures(report)
    if options.json:
        print(json.dumps(dict(case=options.case.name, devices=options.devices, ok=ok, quantities=report.rows, failures=failures(report),
                              undecided=report.undecided, train_loss_rows=losses)))
    else:
        print(report)
        print(f"{options.case.name} on {options.devices} devices: {'passed' if ok else 'FAILED'}")
    sys.exit(0 if ok else 1)

if __name__ == "__main__":
    main()
