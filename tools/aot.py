"""
Compiles every graph of the run for a TPU on a machine without one, and says what each needs: HBM, milliseconds, why not.

    python tools/aot.py                      all graphs of the real run on v6e-8 (minutes each; unchanged ones are not compiled again)
    python tools/aot.py --tpu v5e-8          on another TPU of chips.py; all: on each, one line a TPU at the end
    python tools/aot.py --preset rehearsal   the small run
    python tools/aot.py --list               the graphs and the steps that use them
    python tools/aot.py --graphs A,B         these graphs only
    python tools/aot.py --explain A          the ten dearest operations and the ten largest buffers of A, with their source lines
    python tools/aot.py --fingerprints       only trace: are the graphs those of the newest report in records/ (or --against FILE)?

The graphs are the ones that training runs: train_gpt_xla traces them with its own step functions, kernels for the TPU and donated
buffers, and libtpu compiles them with the flags that torch_xla and train_gpt_xla set on a TPU. Nothing is executed. How a
millisecond is arrived at is told in hlo_cost.py; these are estimates, to compare variants with. Writes DIR/report.json, and of
each graph NAME.hlo.pb (as exported), NAME.tpu.txt (as optimised) and NAME.json (what the compiler said; the cache).

A graph's key in the report is a hash of all that its program is made of, source lines left out. As long as --fingerprints finds the
same keys, moving and renaming code has changed nothing.
"""
import argparse
import dataclasses
import difflib
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import hlo_cost  # noqa: E402

from chips import RECORD, TPUS, Refused, Tpu, supported, tpu_named  # noqa: E402

PINS = {"libtpu": "0.0.21", "jax": "0.7.0", "jaxlib": "0.7.0", "torch": "2.9.0", "torch_xla": "2.9.0"}  # as in requirements.txt
RECIPE = 1  # raise it when compile_graph changes what it asks of libtpu or stores: cached results are then made again
LOCK = "/tmp/libtpu_lockfile"
BESIDE = "set ALLOW_MULTIPLE_LIBTPU_LOAD=1 to compile beside it"

# Record #89 of KellerJordan/modded-nanogpt on 8 H100: the whole of training, and ms a step by tokens a device, the mean of the 13 runs
# of its pull request, which are of 1,390 steps with an older model. No log of exactly its source was published.
CUDA_STEP_MS = {16384: 31.6, 32768: 56.9, 49152: 82.7}
CUDA_TOTAL_S = 73.8
# The compiler's estimates of another record (nikolageorgiev2000/modded-nanogpt-jax, 336 and 558 ms a step) over what its log
# measured on a v6e-8 (307 and 423 ms): that is all the calibration there is.
CALIBRATION = (1.1, 1.3)

# -----------------------------------------------------------------------------
# What the machine must have

def check_versions():
    for name, pin in PINS.items():
        try:
            version = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            raise Refused(f"no {name} here: `bash run_tpu.sh setup` installs {name}=={pin}") from None
        if version != pin:
            others = ", ".join(f"{k} {v}" for k, v in PINS.items() if k != name)
            raise Refused(f"{name} {version} is not {name}=={pin}, which works with {others}: `bash run_tpu.sh setup` installs the pins")


def check_disk(directory: Path, gib: float = 3):
    """A graph's dumped programs take a few hundred MB while it compiles."""
    for place in (directory, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(place).free / 2**30
        if free < gib:
            raise Refused(f"no disk: {free:.1f} GiB free at {place}, {gib:.0f} are needed: make room, or set --out or TMPDIR elsewhere")


def has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def check_lock():
    """libtpu locks a file for the one process that may open the chips, and holds it even to compile."""
    if os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD") == "1" or not os.path.exists(LOCK):
        return
    try:
        with open(LOCK, "rb") as f:
            held = fcntl.fcntl(f, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        raise Refused(f"{LOCK} belongs to another user: remove it, or {BESIDE}") from None
    kind, _, _, _, pid = struct.unpack("hhqqi4x", held)
    if kind != fcntl.F_UNLCK:
        raise Refused(f"libtpu is held by process {pid} ({command_of(pid)}): wait for it, or {BESIDE}")


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:80]
    except OSError:
        return "of another user or container"

# -----------------------------------------------------------------------------
# What this file knows of the kernels

KERNEL_SOURCES = ("kernels/**/*.py",)


def kernels_for(tpu: Tpu) -> list:
    """
    Kernels that are traced from now on are traced for this TPU. Returns a list that takes up attention's calls: name, shapes, operands.
    """
    from kernels import dispatch
    from kernels.attention import Band
    lowered, calls = dispatch.lowered, []
    def note_and_lower(call, shapes, arguments, *rest):
        if isinstance(shapes, Band):
            calls.append([call.__name__, dataclasses.astuple(shapes), arguments])
        return lowered(call, shapes, arguments, *rest)
    dispatch.lowered, dispatch.target = note_and_lower, tpu.chip
    return calls


def attention_program(name: str, shapes: list, operands: list) -> tuple:
    """One of those calls by itself: (function, its arguments' names, shapes and dtypes, how many blocks a whole window has)."""
    import jax.numpy as jnp

    from kernels.attention import Band
    from kernels.tpu import attention
    band, arguments = Band(*shapes), {operand: (tuple(shape), dtype) for operand, shape, dtype in operands}
    return getattr(attention, name)(band, jnp.bfloat16), arguments, max(1, band.reach)

# -----------------------------------------------------------------------------
# Children: tracing needs torch_xla on virtual CPU devices, compiling needs libtpu, which can take its process down with it

def child(task: str, *arguments, log: Path, env: dict, stdin: str = "") -> int:
    """Runs one of the functions below in a process of its own; what it and libtpu print goes to the log."""
    with open(log, "w") as f:
        return subprocess.run([sys.executable, __file__, f"_{task}", *map(str, arguments)], input=stdin, text=True, stdout=f,
                              stderr=subprocess.STDOUT, env={**os.environ, **env}).returncode


def last_words(log: Path) -> str:
    """The line of a log that says why a process died."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"F\d{4} |\w*(Error|Exception)\b|.*(XlaRuntimeError|Check fail|MemoryError)", line)]
    return (telling or lines or ["it left no message"])[-1][:600]


def export_graphs(tpu: str, preset: str, out: str, *names: str):
    """
    Traces graphs of the run and writes their HLO, NAME.hlo.pb, and as exported.json the flags of a TPU run, the bytes of
    state on a chip that each graph does not touch but that lie there all the same, and its calls of attention's kernels. In a child.
    """
    import torch_xla
    from jax._src.lib import xla_client as xc
    from torch_xla._internal import tpu as this_machine

    import train_gpt_xla as train
    from replay import Recording
    from spmd import device_count, to_device, turns

    # torch_xla adds its own flags where it finds a TPU, by its generation; let it do the same here.
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {train.LIBTPU_INIT_ARGS}"
    this_machine.version = lambda: TPUS[tpu].chip.generation
    torch_xla._setup_libtpu_flags()
    exported = {"flags": os.environ["LIBTPU_INIT_ARGS"].split(), "untouched": {}, "attention": {}}
    calls = kernels_for(TPUS[tpu])
    train.setup_devices()
    args = train.presets[preset]()
    manager = train.build(args)
    for graph, steps in train.distinct_graphs(args, turns()).items():
        if graph.name not in names:
            continue
        began = time.perf_counter()
        calls.clear()
        manager.advance_schedule(steps[0], train=graph.train)
        manager.graph = graph
        batch = [] if graph.part == "update" else [to_device(train.blank_batch(graph.tokens), "data")]
        inputs = [*batch, to_device(manager.get_numbers())]
        recording = Recording(manager.program, inputs, manager.tensors(), hlo=True)
        state = manager.tensors()
        tensors = state + inputs
        shapes = [tuple(s.dimensions()) for s in xc.XlaComputation(recording.hlo).program_shape().parameter_shapes()]
        if shapes != [tuple(tensors[i].shape) for i in recording.sources]:
            raise ValueError(f"{graph.name}: the parameters of the exported graph are not in the order of the recording's inputs")
        donors = [k for k, i in enumerate(recording.sources) if i in set(recording.changed)]
        Path(out, f"{graph.name}.hlo.pb").write_bytes(donate(recording.hlo, donors))
        share = lambda x: device_count() if "devices=" in torch_xla._XLAC._get_xla_sharding_spec(x) else 1
        exported["untouched"][graph.name] = sum(x.nbytes // share(x) for i, x in enumerate(state) if i not in recording.sources)
        exported["attention"][graph.name] = list(calls)
        print(f"traced {graph.name} in {time.perf_counter() - began:.1f} s", flush=True)
    Path(out, "exported.json").write_text(json.dumps(exported))


def donate(hlo: bytes, parameters: list[int]) -> bytes:
    """
    Marks parameters of a serialised HloModuleProto as buffers that the outputs may take over, as torch_xla does on its way to the
    compiler, after the point where it exports. Field 18, buffer_donor, holds entries (1) with a parameter_number (1).
    """
    def number(n):
        return bytes([n & 127 | 128]) + number(n >> 7) if n > 127 else bytes([n])

    entries = b"".join(b"\x0a" + number(len(n) + 1) + b"\x08" + n for n in map(number, parameters))
    return hlo + number(18 << 3 | 2) + number(len(entries)) + entries  # appended to a message, a field is part of it


def fingerprints(*paths: str):
    """Prints a hash of what each HLO file computes: without source lines, so that a comment does not cost a compile. In a child."""
    import base64

    from jax._src.lib import xla_client as xc
    from jaxlib.mlir import ir

    def kernel(match):  # a Mosaic kernel carries the lines and paths of its Python source
        with ir.Context() as context:
            context.allow_unregistered_dialects = True
            return ir.Module.parse(base64.b64decode(match.group(1))).operation.get_asm(enable_debug_info=False)

    options = xc._xla.HloPrintOptions()
    options.print_metadata = False
    options.print_large_constants = True
    for path in paths:
        module = xc.XlaComputation(Path(path).read_bytes()).get_hlo_module()
        text = re.sub(r"^HloModule [^,]*", "HloModule", module.to_string(options))  # its name is a counter
        text = re.sub(r'\\?"body\\?": ?\\?"([A-Za-z0-9+/=]+)\\?"', kernel, text)
        print(hashlib.sha256(text.encode()).hexdigest(), flush=True)


def compile_graph(tpu: str, source: str, text: str, result: str, dump: str):
    """
    Compiles an HLO file for a TPU and writes the optimised HLO and, as JSON, what else libtpu says: memory, the buffers at
    their peak, the bundles of the programs that it makes no estimate of. In a child, with libtpu's flags in LIBTPU_INIT_ARGS
    and on stdin the names of programs to write that could not be guessed.
    """
    import numpy as np
    from jax._src.interpreters import mlir as jax_mlir
    from jax._src.lib import xla_client as xc
    from jax.experimental import topologies
    from jaxlib.mlir import ir

    hlo = xc.XlaComputation(Path(source).read_bytes())
    exported = hlo.get_hlo_module().to_string()
    os.environ["LIBTPU_INIT_ARGS"] += " " + dump_flags(dump, exported, sys.stdin.read().split())
    devices = topologies.get_topology_desc(**TPUS[tpu].description).devices  # loads libtpu, which reads its flags now
    donors = re.search(r"^HloModule [^\n]*?buffer_donor=\{([^=]*)\}, entry", exported)
    donors = {int(n) for n in re.findall(r"\((\d+), \{\}\)", donors.group(1))} if donors else set()
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(xc._xla.mlir.xla_computation_to_mlir_module(hlo))
        main = next(f for f in module.body.operations if f.name.value == "main")
        donated = {"jax.buffer_donor": ir.BoolAttr.get(True)}  # the conversion from HLO drops it
        main.arg_attrs = [ir.DictAttr.get({a.name: a.attr for a in attrs} | (donated if i in donors else {}))
                          for i, attrs in enumerate(main.arg_attrs)]
        code = jax_mlir.module_to_bytecode(module)
    options = xc.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(devices)
    build = options.executable_build_options
    build.use_spmd_partitioning, build.num_replicas, build.num_partitions = True, 1, len(devices)
    build.allow_spmd_sharding_propagation_to_output = [True]  # as torch_xla; else all sharded state is gathered at the outputs
    build.device_assignment = xc.DeviceAssignment.create(np.arange(len(devices)).reshape(1, -1))
    build.debug_options.xla_dump_to = dump
    build.debug_options.xla_dump_hlo_as_text = True
    began, found = time.perf_counter(), {}
    try:
        executable = devices[0].client.compile(code, xc.DeviceList(tuple(devices)), options)
    except Exception as e:  # an XlaRuntimeError, of which jaxlib has several
        found["error"] = str(e)
    else:
        m = executable.get_compiled_memory_stats()
        found["bytes"] = {"arguments": m.argument_size_in_bytes, "outputs": m.output_size_in_bytes, "aliased": m.alias_size_in_bytes,
                          "temporaries": m.temp_size_in_bytes, "code": m.generated_code_size_in_bytes}
        optimised = executable.hlo_modules()[0].to_string()
        Path(text).write_text(optimised)
        found["kernel_names"], found["kernel_bytes"] = kernel_names(optimised)
        rows = hlo_cost.Estimate(hlo_cost.Module(optimised)).rows
        found["unestimated"] = sorted({r.op.name for r in rows if r.how == "none"})
    found["compile_s"] = time.perf_counter() - began
    found["bundles"] = {}
    for path in glob.glob(f"{dump}/*-final_bundles.txt"):
        name = re.match(r"\d+-(.+)-\d+-final_bundles\.txt", os.path.basename(path))
        if name and name.group(1) != "TLP":  # the top-level program that calls the others
            found["bundles"][name.group(1)] = hlo_cost.bundle_cycles(Path(path).read_text(errors="replace"))
    buffers = sorted(glob.glob(f"{dump}/*after_optimizations-buffer-assignment.txt"))
    if buffers:
        optimised = Path(buffers[-1].replace("-buffer-assignment", "")).read_text(errors="replace")
        found["buffers"] = hlo_cost.largest_buffers(Path(buffers[-1]).read_text(errors="replace"),
                                                    hlo_cost.Module(optimised, kernel_names(optimised)[0]))
    Path(result).write_text(json.dumps(found))


def count_attention(tpu: str, source: str, result: str, dump: str):
    """
    {call: ms} for calls of attention's kernels, as JSON, each compiled by itself and counted as if every query saw all of its window.
    How far its loop over blocks goes depends on the documents, so in a graph's report it goes around once. In a child.
    """
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding
    os.environ["LIBTPU_INIT_ARGS"] += (f" --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
                                       "--xla_jf_dump_llo_pass_label_regex=final_bundles")
    chip = SingleDeviceSharding(topologies.get_topology_desc(**TPUS[tpu].description).devices[0])
    kernels_for(TPUS[tpu])
    found = {}
    for call in json.loads(Path(source).read_text()):
        function, arguments, blocks = attention_program(*call)
        for old in glob.glob(f"{dump}/*"):
            os.remove(old)
        jax.jit(function).lower(**{name: jax.ShapeDtypeStruct(*x, sharding=chip) for name, x in arguments.items()}).compile()
        programs = [Path(program).read_text(errors="replace") for program in glob.glob(f"{dump}/*-final_bundles.txt")]
        cycles = max(hlo_cost.bundle_cycles(text, blocks)[0] for text in programs)  # the others make first_seen
        found[json.dumps(call)] = 1e3 * cycles / TPUS[tpu].chip.clock_hz
    Path(result).write_text(json.dumps(found))


def whole_windows(calls: dict[str, list], tpu: Tpu, out: Path, flags: list[str]) -> dict[str, dict[str, float]]:
    """For each graph the ms of attention's forward and backward kernels over whole windows; from the cache where nothing changed."""
    wanted = sorted({json.dumps(call) for graph in calls.values() for call in graph})
    cache = out / "attention.json"
    key = hashlib.sha256(json.dumps([wanted, flags, sorted(PINS.items()), tpu.description, sources(*KERNEL_SOURCES, "tools/hlo_cost.py")]
                                    ).encode()).hexdigest()
    known = json.loads(cache.read_text()) if cache.exists() else {}
    if known.get("key") != key and wanted:
        if has_tpu():
            check_lock()
        with tempfile.TemporaryDirectory(prefix="aot_") as folder:
            source, result, dump, log = (Path(folder, name) for name in ("calls.json", "ms.json", "dump", "log"))
            source.write_text(json.dumps([json.loads(call) for call in wanted]))
            dump.mkdir()
            if child("count_attention", tpu.name, source, result, dump, log=log, env=tpu_environment(tpu, flags)):
                raise Refused(f"attention's kernels could not be counted: {last_words(log)}")
            known = {"key": key, "ms": json.loads(result.read_text())}
        cache.write_text(json.dumps(known))
    return {graph: {kernel: sum(known["ms"][json.dumps(call)] for call in some if call[0] == kernel)
                    for kernel in ("attention_forward", "attention_backward")} for graph, some in calls.items()}


def tpu_environment(tpu: Tpu, flags: list[str]) -> dict[str, str]:
    """Of a child that compiles for a TPU."""
    env = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": tpu.name.replace("v5e", "v5litepod"),
           "TPU_WORKER_HOSTNAMES": "localhost", "LIBTPU_INIT_ARGS": " ".join(flags)}
    # the lock guards chips; where there are none it guards nothing
    return env if has_tpu() else env | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def dump_flags(directory: str, exported: str, names: list[str]) -> str:
    """
    Makes libtpu write the final programs of kernels, gathers, scatters, sorts. Writing all of them would double the time of a
    compilation, and the filter takes only exact names, so this lists the numbers that libtpu is likely to give them.
    """
    calls = re.findall(r'%?([\w\-]+?)(?:\.\d+)* = ([^\n]*custom_call_target="tpu_custom_call"[^\n]*)', exported)
    # A kernel is named after what encloses its call: ".../jit(<lambda>)/pallas_call" becomes _lambda_.40
    outer = [re.search(r'op_name="[^"]*?([^/"()]+)\)?/pallas_call', line) for _, line in calls]
    kernels = [name for name, _ in calls] + [re.sub(r"\W", "_", m.group(1)) for m in outer if m]
    likely = {"concatenate": 20, "dynamic-update-slice": 20, "fusion": 64, "gather": 20, "pad": 20, "reshape": 20, "scatter": 20,
              "slice": 20, "sort": 20, "xla__computation": 8 * len(kernels) + 64}
    likely |= dict.fromkeys(kernels, 8 * len(kernels) + 64)
    names = sorted({*names, *likely, *(f"{base}.{i}" for base, n in likely.items() for i in range(n))})
    return (f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles "
            f"--xla_jf_dump_only_matching_hlo={';'.join(f'{name}=true' for name in names)}")


def kernel_names(text: str) -> tuple[dict, dict]:
    """{instruction: the name its pallas_call was given}, {instruction: bytes_moved()}."""
    import base64

    from jaxlib.mlir import ir

    names, moved = {}, {}
    for name, body in re.findall(r'%([\w.\-]+) = [^\n]*?custom_call_target="tpu_custom_call"[^\n]*?"body":"([A-Za-z0-9+/=]+)"', text):
        with ir.Context() as context:
            context.allow_unregistered_dialects = True
            module = ir.Module.parse(base64.b64decode(body))
            attributes = module.operation.attributes
            names[name] = ir.StringAttr(attributes["sym_name"]).value if "sym_name" in attributes else name
            moved[name] = bytes_moved(module)
    return names, moved


def bytes_moved(module) -> list:
    """
    What a Mosaic kernel's pipeline moves between HBM and VMEM: the bytes of each operand and result, in order. A block comes again as
    often as its place changes. None where that is for the kernel itself (no blocks), and where it depends on numbers that are only there at
    run time, as those of a walk through sorted tokens.
    """
    functions = {f.attributes["sym_name"].value: f for f in module.body.operations}
    main = functions["main"]
    if "window_params" not in main.attributes:
        return []
    grid, scalars = list(main.attributes["iteration_bounds"]), main.attributes["scalar_prefetch"].value
    memories = list(main.regions[0].blocks[0].arguments)[len(grid) + scalars:]
    moved = [0] * scalars
    for window, memory in zip(main.attributes["window_params"], memories):
        words = re.fullmatch(r"memref<((?:\d+x)*)[a-z]*(\d+), .*", str(memory.type))
        if "window_bounds" not in window or not words or "vmem" not in str(memory.type):
            moved.append(None)
            continue
        block = functions[window["transform_indices"].value].regions[0].blocks[0]
        used = [i for i, x in enumerate(list(block.arguments)[:len(grid)]) if list(x.uses)]
        at_run_time = used and any("load" in op.operation.name for op in block.operations)
        size = math.prod(map(int, words[1].split("x")[:-1])) * int(words[2]) // 8
        moved.append(None if at_run_time else size * math.prod(grid[:used[-1] + 1] if used else ()))
    return moved

# -----------------------------------------------------------------------------
# From a graph to its line in the report

def sources(*patterns: str) -> list[list[str]]:
    """Name and text of files of the repository."""
    return [[str(p.relative_to(ROOT)), p.read_text()] for pattern in patterns for p in sorted(ROOT.glob(pattern))]


def key_of(fingerprint: str, tpu: Tpu, flags: list[str]) -> str:
    """The name of a compilation: everything that goes into it."""
    return hashlib.sha256(json.dumps([RECIPE, fingerprint, sorted(flags), tpu.description, sorted(PINS.items())]).encode()).hexdigest()


def compiled(name: str, tpu: Tpu, out: Path, flags: list[str], fingerprint: str) -> dict:
    """What the compiler says of out/NAME.hlo.pb, from the cache where nothing has changed."""
    cache, text, key = out / f"{name}.json", out / f"{name}.tpu.txt", key_of(fingerprint, tpu, flags)
    try:
        before = json.loads(cache.read_text())
    except (FileNotFoundError, ValueError):
        before = {}
    if before.get("key") == key and before.get("count") == hlo_cost.COUNT and (text.exists() or "error" in before):
        return {**before, "cached": True}
    for stale in (cache, text):
        stale.unlink(missing_ok=True)
    found = compile_in_child(name, tpu, out, flags, before.get("unestimated", []))
    if "bundles" not in found:
        return {**found, "key": key, "cached": False}  # it died; not kept: the next run tries again
    if "unestimated" in found:
        estimate = hlo_cost.Estimate(hlo_cost.Module(text.read_text()), found["bundles"])
        if any(r.how == "none" and (r.kind == "kernels" or r.bytes > 2**22) for r in estimate.rows):
            found |= compile_in_child(name, tpu, out, flags, found["unestimated"])  # the names were guessed wrong; now they are known
    # Last, so that a cache entry always has its text.
    found |= {"key": key, "count": hlo_cost.COUNT}
    partial = cache.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(cache)
    return {**found, "cached": False}


def compile_in_child(name: str, tpu: Tpu, out: Path, flags: list[str], programs: list[str]) -> dict:
    """Compiles out/NAME.hlo.pb to out/NAME.tpu.txt and returns what else there is to say."""
    if has_tpu():
        check_lock()
    log = out / f"{name}.log"
    with tempfile.TemporaryDirectory(prefix="aot_") as dump:
        result, optimised = Path(dump, "result.json"), Path(dump, "optimised.txt")
        status = child("compile_graph", tpu.name, out / f"{name}.hlo.pb", optimised, result, dump, log=log,
                       env=tpu_environment(tpu, flags), stdin=" ".join(programs))
        if optimised.exists():
            shutil.move(optimised, out / f"{name}.tpu.txt")
        if result.exists():
            log.unlink()
            return json.loads(result.read_text())
        words = last_words(log)
        if "multi-process lockfile" in words:
            check_lock()
            raise Refused(f"libtpu's lock {LOCK} is held: wait for its process, or {BESIDE}")
        if "No space left" in words:
            raise Refused(f"no disk: {words}")
        return {"error": f"the compiler died (status {status}), its log is {log}: {words}"}


def why_not(error: str, kind: str) -> str:
    """One line for a compiler's error, with the way out."""
    line = " ".join(error.split())
    if clash := re.search(r"Unsupported version: expected <= (\d+) but got (\d+)", line):
        return (f"Mosaic version clash: jax writes kernels in version {clash.group(2)}, libtpu reads up to {clash.group(1)} "
                f"(pytorch/xla#9614): install jax=={PINS['jax']} jaxlib=={PINS['jaxlib']}")
    if "RESOURCE_EXHAUSTED" in line or "would exceed memory" in line:
        setting = "val_batch_size" if kind == "val" else "train_bs_schedule"
        one = re.search(r"Allocation \(size=(\d+)\).*?shape = '([^']*)', space=(\w+).*?tag = '([^']*)'", line)
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", line)
        what, memory = line[:200], "hbm"
        if one:
            size, shape, memory, tag = one.groups()
            what = f"{shape} ({int(size) / 2**30:.1f} GiB, {tag.replace('@{}', '')}) alone exceeds {memory}"
        elif used:
            what, memory = "{} of {} {}".format(*used.groups()), used.group(3)
        turn = f"fewer tokens a step (Hyperparameters.{setting})" if memory == "hbm" else "smaller blocks in the kernel that needs it"
        return f"does not fit: {what}; to turn: {turn}"
    return line[:300]


def assess(graph, found: dict, tpu: Tpu, out: Path, untouched: int = 0, attention: dict | None = None) -> dict:
    """
    A graph's entry in the report. untouched: bytes of state in HBM that the graph does not take. attention: ms of its kernels over
    whole windows (whole_windows), which take the place of what the graph's own count of them is.
    """
    entry = {"name": graph.name, "kind": graph.kind, "steps": graph.steps, "times": graph.times, "tokens_per_row": graph.tokens,
             "compiled": "error" not in found, "cached": found["cached"], "key": found["key"]}
    if "error" in found:
        return {**entry, "why": why_not(found["error"], graph.kind), "error": found["error"][:4000],
                "largest_buffers": found.get("buffers", [])}
    gib = {k: v / 2**30 for k, v in {**found["bytes"], "untouched": untouched}.items()}
    total = gib["arguments"] + gib["outputs"] - gib["aliased"] + gib["temporaries"] + gib["code"] + gib["untouched"]
    limit = tpu.chip.hbm_bytes / 2**30
    if total > limit:
        entry["why"] = f"does not fit: {total:.2f} of {limit:.2f} GiB"
    module = hlo_cost.Module((out / f"{graph.name}.tpu.txt").read_text(), found["kernel_names"])
    estimate = hlo_cost.Estimate(module, found["bundles"], tpu.chip, found["kernel_bytes"])
    summary = estimate.summary()
    for call, ms in (attention or {}).items():
        kernel = summary["kernels"].get(f"{call}_kernel", {"ms": math.inf})
        more = max(0.0, ms - kernel["ms"])
        if more:
            kernel.update(ms=kernel["ms"] + more, how="bundles, whole windows")
            for k in ("kernels", "total"):
                summary["est_ms"][k] += more
            summary["lower_bounds_ms"] += more
    return {**entry, "fits": total <= limit, "hbm_gib": {**gib, "total": total, "limit": limit}, **summary,
            "kernels_ms": summary["est_ms"]["kernels"], "collectives_ms": summary["collectives"]["ms"], "compile_s": found["compile_s"],
            "dearest_ops": estimate.dearest(), "dearest_lines": estimate.dearest_lines(), "largest_buffers": found.get("buffers", [])}


def build_report(graphs: list[dict], tpu: Tpu, preset: str, flags: list[str], complete: bool) -> dict:
    """The figures of the whole schedule and everything that they rest on."""
    totals = {}
    for kind in ("train", "val"):
        entries = [g for g in graphs if g["kind"] == kind]
        known = complete and entries and all(g["compiled"] for g in entries)
        totals[kind] = sum(g["steps"] * g["times"] * g["est_ms"]["total"] for g in entries) / 1e3 if known else None
    stages = {}
    for g in graphs:
        if g["kind"] == "train" and g["compiled"]:
            stages.setdefault(g["tokens_per_row"], []).append((g["steps"], g["times"] * g["est_ms"]["total"]))
    updates = stages.pop(0, [])  # where rows take turns, after the last one
    mean = lambda parts: sum(n * ms for n, ms in parts) / max(1, sum(n for n, _ in parts))
    total, sizes, chip = totals["train"], [g["hbm_gib"] for g in graphs if g["compiled"]], tpu.chip
    with_code, limit = max((m["total"] - m["code"] for m in sizes), default=0) + sum(m["code"] for m in sizes), chip.hbm_bytes / 2**30
    return {
        "record": RECORD, "tpu": tpu.name, "preset": preset, "topology": tpu.topology, "devices": tpu.devices, "versions": PINS,
        "flags": flags,
        "fits": all(g.get("fits") for g in graphs) and with_code <= limit, "hbm_gib_with_all_code": with_code, "hbm_limit_gib": limit,
        "total_est_s": total, "total_est_s_calibrated": [total / c for c in CALIBRATION[::-1]] if total and chip.name == "v6e" else None,
        "calibration": {"divide_by": CALIBRATION, "why": "another v6e-8 record: 336 and 558 ms a step estimated, 307 and 423 in its log"},
        "validation_est_s": totals["val"], "step_est_ms": {str(t): mean(parts) + mean(updates) for t, parts in sorted(stages.items())},
        "cuda_8xH100": {"step_ms": {str(k): v for k, v in CUDA_STEP_MS.items()}, "total_s": CUDA_TOTAL_S},
        "assumptions": {"clock_hz": chip.clock_hz, "hbm_bytes_per_s": chip.hbm_bandwidth, "link_bytes_per_s": chip.link_bytes_per_s,
                        "rings": hlo_cost.RINGS, "source": assumed(tpu)},
        "graphs": graphs,
    }


def assumed(tpu: Tpu) -> str:
    """What the figures take for granted of this TPU, in a sentence."""
    chip = tpu.chip
    links = "no links" if tpu.chips == 1 else (f"a ring each way of {chip.link_bytes_per_s / 1e9:.0f} GB/s through the {tpu.chips} chips, "
                                               f"because {tpu.topology} does not wrap")
    cores = "" if chip.cores == 1 else (f"; {chip.cores} cores a chip, the second used by a kernel only where its grid has a parallel "
                                        "dimension")
    return (f"{tpu.name}: {chip.clock_hz / 1e9:g} GHz (the peak of {chip.bf16_flops / 1e12:.0f} TFLOP/s over what libtpu counts for a "
            f"cycle), {chip.hbm_bandwidth / 1e9:.0f} GB/s of HBM, {links}{cores}. Not measured; from Google's pages, see chips.py.")


def table(report: dict) -> str:
    """The report for people: a line a graph, the totals, and what is missing from them."""
    memory = ("arguments", "outputs", "temporaries", "code", "untouched", "total")
    limit = f"HBM, GiB of {report['hbm_limit_gib']:.2f}"
    lines = [f"{report['tpu']:34} {'':>5} {'tokens':>6} | {limit:^38} | {'estimated ms':^49} | {'collectives':^16}",
             f"{'graph':34} {'steps':>5} {'a row':>6} | {'args':>6}{'outs':>6}{'temps':>7}{'code':>6}{'rest':>6}{'total':>7} | "
             f"{'matmul':>8}{'elemw':>8}{'copies':>8}{'kernels':>8}{'links':>8}{'total':>9} | {'n':>4}{'MiB':>6}{'ms':>6}"]
    notes, compiled = [], [g for g in report["graphs"] if g["compiled"]]
    for g in report["graphs"]:
        start = f"{g['name']:34} {g['steps']:5} {g['tokens_per_row']:6} | "
        if not g["compiled"]:
            lines.append(start + "not compiled: " + g["why"])
            continue
        gib, ms, c = {**g["hbm_gib"], "outputs": g["hbm_gib"]["outputs"] - g["hbm_gib"]["aliased"]}, g["est_ms"], g["collectives"]
        lines.append(start + "".join(f"{gib[k]:{w}.2f}" for k, w in zip(memory, (6, 6, 7, 6, 6, 7))) + " | "
                     + "".join(f"{ms[k]:8.2f}" for k in hlo_cost.KINDS) + f"{ms['total']:9.2f} | "
                     + f"{c['count']:4}{c['mib']:6.0f}{c['ms']:6.2f}" + ("" if g["fits"] else "  DOES NOT FIT"))
        if g["not_estimated"]:
            worst = sorted(g["not_estimated"], key=lambda x: -x.get("hbm_mib", 0) * x["times"])[:3]
            mib = sum(x.get("hbm_mib", 0) * x["times"] for x in g["not_estimated"])
            notes.append(f"  {g['name']}: {len(g['not_estimated'])} operations on {mib:.1f} MiB of HBM, most first: "
                         + ", ".join(f"{x['op']} x {x['times']}" for x in worst))
    bounds = max((g["lower_bounds_ms"] for g in compiled), default=0)
    lines += ["", "outs: less what takes over an argument's buffer. rest: state that the graph does not touch. links: what of the "
              "collectives nothing hides.", "kernels: lower bounds, the bundles of their final programs without waits for memory, "
              "attention's over whole windows; so are", f"gathers, scatters and sorts. Up to {bounds:.2f} ms of a step are such bounds."]
    if compiled:
        lines.append(f"With the code of all these graphs in HBM at once, the largest needs {report['hbm_gib_with_all_code']:.2f} GiB.")
    lines.append("Assumed of a " + report["assumptions"]["source"])
    lines += ["Not in the totals:", *notes] if notes else ["Nothing is left out of the totals."] if compiled else []
    for tokens, ms in report["step_est_ms"].items():
        cuda = report["cuda_8xH100"]["step_ms"].get(tokens)
        lines.append(f"{int(tokens):6} tokens a row: {ms:7.1f} ms a step est."
                     + (f"; the CUDA record, measured on 8 H100: {cuda:.1f} ms" if cuda else ""))
    if total := report["total_est_s"]:
        low, high = report["total_est_s_calibrated"] or (None, None)
        lines += [f"Training, all steps: {total:.1f} s est."
                  + (f"; divided by {CALIBRATION[1]} to {CALIBRATION[0]}, {low:.1f} to {high:.1f} s" if low else "")
                  + (f"; the CUDA record, measured: {CUDA_TOTAL_S} s." if report["preset"] == "record" else "."),
                  f"(The same estimates of another v6e-8 record are {CALIBRATION[0]} to {CALIBRATION[1]} times what its log measured"
                  + (".)" if low else "; nothing is known of other TPUs.)")]
    else:
        lines.append("No total: that takes all graphs, compiled.")
    if val := report["validation_est_s"]:
        lines.append(f"Validation, off the clock: {val:.1f} s est.")
    return "\n".join(lines)


def row(report: dict) -> dict:
    """A TPU's line in the table of all."""
    compiled = [g for g in report["graphs"] if g["compiled"]]
    why = next((g["why"] for g in report["graphs"] if not g.get("fits")), None)
    return {"record": report["record"], "tpu": report["tpu"], "fits": report["fits"],
            "hbm_gib": report["hbm_gib_with_all_code"] if compiled else None,
            "hbm_limit_gib": report["hbm_limit_gib"], "total_est_s": report["total_est_s"], "step_est_ms": report["step_est_ms"],
            "compiled_graphs": len(compiled), "of": len(report["graphs"]), "why": why, "assumptions": report["assumptions"]}


def table_of_all(rows: list[dict]) -> str:
    lines = [f"{'TPU':6} {'graphs':>8} {'HBM, GiB':>16} {'training, est.':>15}   ms a step est., by tokens a row"]
    for r in rows:
        hbm = "-" if r["hbm_gib"] is None else f"{r['hbm_gib']:.2f} of {r['hbm_limit_gib']:.2f}"
        total = f"{r['total_est_s'] / 60:.1f} min" if r["total_est_s"] else "-"
        steps = ", ".join(f"{tokens}: {ms:.1f}" for tokens, ms in r["step_est_ms"].items())
        graphs = f"{r['compiled_graphs']} of {r['of']}"
        lines.append(f"{r['tpu']:6} {graphs:>8} {hbm:>16} {total:>15}   " + (r["why"] or steps))
    return "\n".join([*lines, "", "HBM: the largest graph, with the code of all. Compiled, not run; what is assumed of each:",
                      *(r["assumptions"]["source"] for r in rows)])


def explanation(g: dict) -> str:
    """What to change in a graph: its dearest operations and largest buffers."""
    lines = [f"{g['name']}: {g.get('why', '')}"]
    if g["compiled"]:
        lines = [f"{g['name']}: {g['est_ms']['total']:.2f} ms est., {g['hbm_gib']['total']:.2f} GiB of HBM", "",
                 "The ten dearest operations: ms a step, times, kind, who says so"]
        for r in g["dearest_ops"]:
            lines += [f"{r['ms']:9.3f} ms  x{r['times']:<4} {r['kind']:11} {r['how']:9} {r['op']}  {r['shape'][:80]}",
                      f"{'':14}{r['source']}"]
        lines += ["", "The ten dearest source lines, or kernels"]
        for r in g["dearest_lines"]:
            lines.append(f"{r['ms']:9.3f} ms  {r['line']}  (" + ", ".join(f"{k} {r[k]:.2f}" for k in hlo_cost.KINDS if k in r) + ")")
        lines.append("")
        for name, k in g["kernels"].items():
            lines.append(f"kernel {name}: {k['calls']} calls, at least {k['ms']:.3f} ms in all ({k['how']})")
        for kind, c in g["collectives"]["kinds"].items():
            lines.append(f"{kind}: {c['count']} of {c['mib']:.1f} MiB in all, {c['ms']:.3f} ms on the links, "
                         f"{c['exposed_ms']:.3f} not hidden")
        for x in g["not_estimated"]:
            lines.append(f"not estimated: {x['op']} ({x['opcode']}) x {x['times']} {x.get('why', '')} {x.get('source', '')}")
    lines += ["", "The ten largest buffers in HBM at its fullest"]
    for b in g["largest_buffers"]:
        lines += [f"{b['bytes'] / 2**20:9.1f} MiB  {b['buffer']}  {b['shape'][:90]}", f"{'':14}{b['source']}"]
    return "\n".join(lines)

# -----------------------------------------------------------------------------
# The command

def listing(preset: str, devices: int = 8) -> list[SimpleNamespace]:
    """
    The graphs of a run, in order of first use. steps: how many steps use it (of a validation, batches). times: how often each of them
    runs it.
    """
    os.environ.setdefault("PJRT_DEVICE", "CPU")  # importing must not open a TPU that is there
    import train_gpt_xla as train
    if preset not in train.presets:
        raise Refused(f"no preset {preset!r}: there are {', '.join(train.presets)}")
    args = train.presets[preset]()
    weigh = lambda g, steps: len(steps) if g.train else len(steps) * (args.val_tokens // args.val_batch_size)
    return [SimpleNamespace(name=g.name, kind="train" if g.train else "val", steps=weigh(g, steps), tokens=g.tokens,
                            times=1 if g.part == "update" else train.ROWS // devices)
            for g, steps in train.distinct_graphs(args, train.ROWS // devices).items()]


def select(graphs: list, wanted: str) -> list:
    """Graphs by name; a name that does not exist gets the nearest one that does."""
    if wanted == "all":
        return graphs
    by_name = {g.name: g for g in graphs}
    for name in (names := [n.strip() for n in wanted.split(",") if n.strip()]):
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1, 0)
            raise Refused(f"no graph {name!r}: did you mean {near[0]!r}? --list shows all {len(by_name)}")
    if not names:
        raise Refused("--graphs got no name: --list shows them")
    return [by_name[n] for n in dict.fromkeys(names)]


def trace(graphs: list, tpu: Tpu, preset: str, out: Path) -> dict:
    """
    Exports the graphs to out; returns the flags of a TPU run and by graph its fingerprint and the state that it does not touch.
    Where no source file has changed since they were exported, neither have they.
    """
    code = hashlib.sha256(json.dumps([preset, tpu.description, sorted(PINS.items()), os.environ.get("LIBTPU_INIT_ARGS"),
                                      sources("*.py", *KERNEL_SOURCES, "tools/aot.py")]).encode()).hexdigest()
    kept, log = out / "traced.json", out / "trace.log"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    known = known if known.get("sources") == code else {"sources": code, "fingerprints": {}, "untouched": {}, "attention": {}}
    names = [g.name for g in graphs if g.name not in known["fingerprints"] or not (out / f"{g.name}.hlo.pb").exists()]
    if names:
        # DEBUG: source lines of every operation, for --explain; they do not change what is computed. MALLOC: what is freed goes back.
        env = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(tpu.devices), "XLA_HLO_DEBUG": "1", "XLA_IR_DEBUG": "1",
               "MALLOC_MMAP_THRESHOLD_": "1048576"}
        if status := child("export_graphs", tpu.name, preset, out, *names, log=log, env=env):
            why = "it was killed, as Linux does where memory runs out: the record takes 19 GB and more" if status == -9 else last_words(log)
            raise Refused(f"tracing failed, the whole story is in {log}: {why}")
        exported = json.loads((out / "exported.json").read_text())
        if child("fingerprints", *[out / f"{name}.hlo.pb" for name in names], log=log, env={"JAX_PLATFORMS": "cpu"}):
            raise Refused(f"an exported graph could not be read, see {log}: {last_words(log)}")
        hashes = [line for line in log.read_text().splitlines() if re.fullmatch(r"[0-9a-f]{64}", line)]
        known["flags"] = exported["flags"]
        known["untouched"] |= exported["untouched"]
        known["attention"] |= exported["attention"]
        known["fingerprints"] |= dict(zip(names, hashes, strict=True))
        kept.write_text(json.dumps(known))
        log.unlink()
        (out / "exported.json").unlink()
    return known


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def traced(graphs: list, tpu: Tpu, preset: str, out: Path) -> dict:
    """What trace returns, with a word about it."""
    out.mkdir(parents=True, exist_ok=True)
    check_disk(out)
    say(f"tracing {len(graphs)} graphs of the {preset} preset for {tpu.name} on {tpu.devices} virtual devices, where they have changed ...")
    began = time.perf_counter()
    known = trace(graphs, tpu, preset, out)
    say(f"traced in {time.perf_counter() - began:.0f} s")
    return known


def examine(graphs: list, tpu: Tpu, preset: str, out: Path, complete: bool) -> dict:
    """Traces and compiles the graphs; returns the report."""
    known = traced(graphs, tpu, preset, out)
    attention = whole_windows({g.name: known["attention"][g.name] for g in graphs}, tpu, out, known["flags"])
    entries = []
    for i, graph in enumerate(graphs, 1):
        check_disk(out)
        found = compiled(graph.name, tpu, out, known["flags"], known["fingerprints"][graph.name])
        entries.append(assess(graph, found, tpu, out, known["untouched"][graph.name], attention[graph.name]))
        e = entries[-1]
        said = ", unchanged" if e["cached"] else f", compiled in {found['compile_s']:.0f} s" if e["compiled"] else ""
        say(f"[{i}/{len(graphs)}] {graph.name}: " + (f"{e['est_ms']['total']:.1f} ms est." if e["compiled"] else e["why"]) + said)
    return build_report(entries, tpu, preset, known["flags"], complete)


def baseline(path: Path | None, tpu: Tpu, preset: str) -> tuple[Path, dict[str, str]]:
    """A report's file and the key of each of its graphs; the newest of this TPU and preset in records/ if none is named."""
    for report in [path] if path else sorted(ROOT.glob("records/*/report.json"), reverse=True):
        try:
            known = json.loads(report.read_text())
            keys = {g["name"]: g["key"] for g in known.get("graphs", [])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise Refused(f"{report} is no report of `aot`: {e}") from None
        same_run = known.get("record") == RECORD and known.get("preset") == preset and known.get("topology") == tpu.topology
        if same_run and all(keys.values()) and keys:
            return report, keys
        if path:
            raise Refused(f"{report} is of #{known.get('record', 60)}'s {known.get('preset')} on {known.get('topology')}, not of "
                          f"#{RECORD}'s {preset} on {tpu.topology}"
                          if not same_run else f"{report} has no keys of its graphs: make it again with `aot`")
    raise Refused(f"no report of #{RECORD}'s {preset} on {tpu.name} in records/: name one with --against")


def compare(graphs: list, tpu: Tpu, preset: str, out: Path, against: Path | None, complete: bool) -> int:
    """Prints which graphs are those of an earlier report, without compiling; how many are not."""
    report, keys = baseline(against, tpu, preset)
    known = traced(graphs, tpu, preset, out)
    verdicts = {}
    for g in graphs:
        key = key_of(known["fingerprints"][g.name], tpu, known["flags"])
        verdicts[g.name] = "not there before" if g.name not in keys else "same" if key == keys[g.name] else "changed"
    if complete:
        verdicts |= dict.fromkeys(keys.keys() - verdicts.keys(), "gone")
    for name, verdict in verdicts.items():
        print(f"{name:34} {verdict}")
    same = sum(verdict == "same" for verdict in verdicts.values())
    print(f"{same} of {len(verdicts)} graphs are those of {os.path.relpath(report)}")
    return len(verdicts) - same


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip(), allow_abbrev=False)
    parser.add_argument("--tpu", default="v6e-8", metavar="NAME", help=f"{', '.join(t.name for t in TPUS.values() if t.trains)} or all")
    parser.add_argument("--graphs", default="all", metavar="NAMES", help="comma-separated names, or all")
    parser.add_argument("--preset", default="record", help="record or rehearsal")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where reports and the cache are (default: logs/aot/TPU/PRESET)")
    parser.add_argument("--json", action="store_true", help="print the report instead of the table")
    parser.add_argument("--list", action="store_true", help="print the graphs and stop")
    parser.add_argument("--explain", metavar="NAME", help="the dearest operations and largest buffers of one graph")
    parser.add_argument("--fingerprints", action="store_true", help="only trace, and say which graphs are those of an earlier report")
    parser.add_argument("--against", type=Path, metavar="FILE", help="that report (default: the newest in records/)")
    opts = parser.parse_args(argv)
    tpus = [t for t in TPUS.values() if t.trains] if opts.tpu == "all" else [tpu_named(opts.tpu)]
    if len(tpus) > 1 and (opts.explain or opts.fingerprints):
        parser.error("--explain and --fingerprints are of one TPU: name it")
    if opts.against and not opts.fingerprints:
        parser.error("--against is for --fingerprints")
    if not all(t.trains for t in tpus):
        raise Refused(f"{tpus[0].name}: its kernels would need more than the {tpus[0].chip.vmem_bytes / 2**20:.0f} MiB of VMEM of a "
                      f"{tpus[0].chip.name}; {supported()}")
    check_versions()
    everything = {tpu.name: listing(opts.preset, tpu.devices) for tpu in tpus}
    if opts.list:
        for tpu, graphs in everything.items():
            print(f"{tpu}:")
            for g in graphs:
                print(f"  {g.name:34} {g.kind:5} {g.steps:6} steps x {g.times}  {g.tokens:7} tokens a row")
        return 0
    chosen = {tpu: select(graphs, opts.explain or opts.graphs) for tpu, graphs in everything.items()}
    complete = all(len(chosen[tpu]) == len(everything[tpu]) for tpu in chosen)
    place = lambda tpu: opts.out or ROOT / "logs/aot" / tpu.name / opts.preset
    if len(tpus) > 1:
        top = opts.out or ROOT / "logs/aot"
        place = lambda tpu: top / tpu.name / opts.preset
    try:
        if opts.fingerprints:
            return int(bool(compare(chosen[tpus[0].name], tpus[0], opts.preset, place(tpus[0]), opts.against, complete)))
        rows = []
        for tpu in tpus:
            try:
                report = examine(chosen[tpu.name], tpu, opts.preset, place(tpu), complete)
            except Refused as e:
                if len(tpus) == 1:
                    raise
                say(f"{tpu.name}: {e}")
                never = [{"name": g.name, "compiled": False, "why": str(e), "kind": g.kind} for g in chosen[tpu.name]]
                report = build_report(never, tpu, opts.preset, [], complete)
            if not opts.explain:
                (place(tpu) / "report.json").write_text(json.dumps(report, indent=1))
            rows.append(row(report))
        if len(tpus) > 1:
            (top / "report.json").write_text(json.dumps({"tpus": rows}, indent=1))
            print(json.dumps({"tpus": rows}, indent=1) if opts.json else table_of_all(rows))
            return 0 if all(r["fits"] for r in rows) else 1
    except OSError as e:
        raise Refused(f"cannot write to {e.filename or place(tpus[0])}: {e.strerror}: make room there, or choose another --out") from None
    print(json.dumps(report, indent=1) if opts.json else explanation(report["graphs"][0]) if opts.explain else table(report))
    return 0 if all(g.get("fits") for g in report["graphs"]) else 1


if __name__ == "__main__":
    tasks = {f"_{f.__name__}": f for f in (export_graphs, fingerprints, compile_graph, count_attention)}
    if sys.argv[1:2] and sys.argv[1] in tasks:
        sys.exit(tasks[sys.argv[1]](*sys.argv[2:]))
    try:
        sys.exit(main())
    except Refused as e:
        sys.exit(f"aot: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
