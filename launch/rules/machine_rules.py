"""What is refused of the machine that trains, its packages and its GPUs: rules as in `launch.rules.request_rules`.

They are judged on the login node where the job runs with the same Python, and on a job's first node.
"""

from importlib.util import find_spec

from packaging.version import Version

from launch.rules.request import PlanRequest, Rule
from launch.versions import installed_version

FLOORS = {
    "torch": "2.11",
    "transformers": "5.23",
    "trl": "1.16",
    "peft": "0.21",
    "accelerate": "1.15",
    "bitsandbytes": "0.50",
    "deepspeed": "0.19.8",
}
"""Versions below which something measured does not hold; accelerate below 1.15 saves one rank's share (#4206)."""


def deepspeed_can_be_imported(request: PlanRequest) -> str | None:
    """zero2 and zero3 are DeepSpeed's."""
    if not request.packages_here or not request.parallelism.is_zero:
        return None
    if find_spec("deepspeed") is not None:
        return None
    return f"--strategy: {request.strategy} needs DeepSpeed, which is not installed; pip install deepspeed, or use fsdp"


def fsdp_stores_floats(request: PlanRequest) -> str | None:
    """FSDP leaves bytes whole on every rank, and its copies rewrite bfloat16 that looks like NaN."""
    storage = request.quant_storage or request.parallelism.quant_storage
    if not request.parallelism.shards_layers or not request.recipe.quantization.load_in_4bit:
        return None
    if storage in ("float16", "float32"):
        return None
    return (
        f"quant_storage: FSDP2 cannot shard 4-bit weights stored as {storage} ({request.strategy}); store them as "
        "float16 or float32"
    )


def versions_are_those_that_were_measured(request: PlanRequest) -> str | None:
    """Below these versions something that this relies on does not hold."""
    if not request.packages_here:
        return None
    installed = request.versions or _installed()
    old = [
        f"{name} {installed[name]} < {floor}"
        for name, floor in FLOORS.items()
        if (name != "deepspeed" or request.parallelism.is_zero)
        and name in installed
        and Version(installed[name]) < Version(floor)
    ]
    return f"versions: too old ({', '.join(old)}); install the versions of constraints.txt" if old else None


def _installed() -> dict[str, str]:
    """Those of `FLOORS` that are here; the login node of a cluster may lack them."""
    return {name: installed for name in FLOORS if (installed := installed_version(name, ""))}


def gpu_computes_bfloat16(request: PlanRequest) -> str | None:
    """Before compute capability 8.0 a GPU emulates bfloat16, and has no variable-length attention."""
    capability, recipe = request.capability, request.recipe
    if capability is None or capability >= (8, 0):
        return None
    # Also of a quantized base: embeddings, norms, output head and vision tower are not in 4 bits.
    dtypes = {"model.dtype": recipe.model.dtype}
    if recipe.quantization.load_in_4bit:
        dtypes = {"quantization.bnb_4bit_compute_dtype": recipe.quantization.bnb_4bit_compute_dtype, **dtypes}
    wrong = [key for key, dtype in dtypes.items() if dtype == "bfloat16"]
    if not wrong:
        return None
    return (
        f"{', '.join(wrong)}: bfloat16 on a GPU of compute capability {capability[0]}.{capability[1]} "
        "(8.0 is needed); set to float32, or use a newer GPU"
    )


def gpu_has_8_bit_products(request: PlanRequest) -> str | None:
    """`torch._scaled_mm` needs compute capability 8.9 for e4m3, and gives bfloat16 where every row has its scale."""
    capability, recipe = request.capability, request.recipe
    if recipe.model.products != "fp8" or capability is None:
        return None
    if capability < (8, 9):
        return (
            f"model.products: fp8 on a GPU of compute capability {capability[0]}.{capability[1]} (8.9 is needed); "
            "set it to bf16, or use a newer GPU (L4, L40S, H100 or later)"
        )
    dtypes = {"model.dtype": recipe.model.dtype}
    if recipe.quantization.load_in_4bit:
        dtypes["quantization.bnb_4bit_compute_dtype"] = recipe.quantization.bnb_4bit_compute_dtype
    if wrong := [key for key, dtype in dtypes.items() if dtype != "bfloat16"]:
        return (
            f"model.products: fp8 with {', '.join(wrong)} float32; set to bfloat16, or model.products to bf16"
        )
    return None


MACHINE_RULES: tuple[Rule, ...] = (
    deepspeed_can_be_imported,
    fsdp_stores_floats,
    versions_are_those_that_were_measured,
    gpu_computes_bfloat16,
    gpu_has_8_bit_products,
)
