"""What does a prediction depend on, beside the plan?"""

from dataclasses import dataclass

from chatmodel.devices import Device

EXPECTED_CORES = 16  # of a machine that is not here: few servers with GPUs have less


@dataclass(frozen=True)
class Setup:
    """How a plan is to be run; memory is for one device, time and disk for all of them together.

    Args:
        precision: "bf16" or "no" (fp32).
        compiled: whether the model is compiled; what is kept for the backward pass depends on it.
        divided: whether weights and gradients are divided among the devices as well (FSDP), not optimizer state alone;
            of that Muon's momentum is then whole on each.
        data_is_ready: whether the token store is there already.
        cores: of the machine's processor, which make the token store.
        store_share: tokens that are stored for each one that is trained on.
        hourly_rate: US dollars an hour of the whole machine.
    """

    device: Device
    precision: str
    compiled: bool
    device_batch_size: int
    num_devices: int = 1
    divided: bool = False
    eval_every: int = 250
    eval_tokens: int = 20 * 2**19
    data_is_ready: bool = False
    cores: int = EXPECTED_CORES
    store_share: float = 1.05
    hourly_rate: float | None = None

    @property
    def value_bytes(self) -> int:
        """Of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4
