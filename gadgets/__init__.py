"""Gadgetron's side: MRD in, MRD out. `slice_diffusion` is the target of <execute name="gadgets">."""


def slice_diffusion(connection) -> None:
    """Entry point for Gadgetron's <execute>; `connection` is a gadgetron.external Connection after its handshake."""
    from .external import slice_diffusion as run

    run(connection)


def version() -> str:
    """Version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("gadgetron-slicediff")
    except PackageNotFoundError:
        return "not installed"
