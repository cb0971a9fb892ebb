"""The mathematics of diffusion on the pair (x0, eps): tensors in, tensors out. SOLVERS is the one place that lists solvers."""

from lcmdistill.utils.registry import LazyRegistry

SOLVERS = LazyRegistry(
    {
        "ddim": "lcmdistill.diffusion.solvers:ddim",
        "euler": "lcmdistill.diffusion.solvers:euler",
        "heun": "lcmdistill.diffusion.solvers:heun",
        "dpm-solver": "lcmdistill.diffusion.solvers:dpm_solver",
        "dpm-solver++": "lcmdistill.diffusion.solvers:dpm_solver_pp",
    }
)
