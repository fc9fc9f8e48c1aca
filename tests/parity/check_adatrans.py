"""AdaTrans: latent transformer and RealNVP density, in evaluation and training mode."""

import torch.nn.functional as F
from goldens import Golden
from torch import Tensor

from trainers.editing.adatrans import LatentTransformer, RealNVP, from_official


def named(tensors: dict[str, Tensor], recorded: str) -> Tensor:
    """Our tensor for an official name."""
    return tensors[next(iter(from_official({recorded: Tensor()})))]


def check(golden: Golden) -> None:
    config, io = golden.config, golden.io

    def transformer() -> LatentTransformer:
        network = LatentTransformer(
            config["n_styles"], config["style_dim"], config["c_dim"], config["hid_dim"], config["n_layers"]
        )
        network.load_state_dict(from_official(golden.weights_under("adatrans.")))
        return network

    def density() -> RealNVP:
        network = RealNVP(config["style_dim"], config["flow_layers"])
        network.load_state_dict(from_official(golden.weights_under("flow.")))
        return network

    def compare_after(prefix: str, network: LatentTransformer | RealNVP) -> None:
        for name in io:
            if name.startswith(f"{prefix}_after."):
                golden.close(name, named(network.state_dict(), name.removeprefix(f"{prefix}_after.")))

    def compare_gradients(prefix: str, network: LatentTransformer | RealNVP) -> None:
        gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
        for name in io:
            if name.startswith(f"{prefix}_grad."):
                golden.close_gradient(name, named(gradients, name.removeprefix(f"{prefix}_grad.")))

    def compare_density(prefix: str, network: RealNVP, codes: Tensor) -> Tensor:
        nll, log_prior, log_det, z = network(codes)
        golden.close(f"{prefix}_loss", nll)
        golden.close(f"{prefix}_logz", log_prior)
        golden.close(f"{prefix}_log_det", log_det)
        golden.close(f"{prefix}_z", z)
        return nll

    w, target, steps = io["w"], io["target"], config["max_steps"]

    walker, flow = transformer().eval(), density().eval()
    features, _ = walker.encode(w[None])
    direction, size = walker.step(features[-1], target)
    golden.close("func_dy_step0", direction[:, None])
    golden.close("func_size_step0", size)
    trajectory, sizes = walker(w, target, steps)
    golden.close("trajectory", trajectory)
    golden.close("step_sizes", sizes)

    compare_density("flow", flow, w)
    compare_density("flow2d", flow, io["flow2d_in"])
    golden.close("flow_inverse_of_z", flow.inverse(io["flow_z"]).view_as(w))

    nll, recon = flow(trajectory[1:]).nll, F.mse_loss(trajectory[-1], w)
    golden.close("eval_nll", nll)
    golden.close("eval_recon", recon)
    golden.close("eval_norm", trajectory.diff(dim=0).norm(dim=-1).sum(0).mean())
    golden.close("eval_step_size", sizes.sum(1).mean())
    (recon + nll).backward()
    compare_gradients("eval", walker)

    walker = transformer().train()
    trajectory, sizes = walker(w, target, steps)
    golden.close("train_trajectory", trajectory)
    golden.close("train_step_sizes", sizes)
    compare_after("train", walker)

    flow = density().train()
    compare_density("flow_train", flow, w).backward()
    compare_gradients("flow_train", flow)
    compare_after("flow_train", flow)
