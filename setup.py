"""Packaging; see README.md for what this is."""

from pathlib import Path

from setuptools import setup

here = Path(__file__).parent

setup(
    name="gadgetron-slicediff",
    version="0.1.0",
    description="3D MRI reconstruction at the scanner with a 2D diffusion prior: a Gadgetron plugin",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=["gadgets", "gadgets.commands", "gadgets.conformance", "gadgets.simulation", "recon_core"],
    package_data={"gadgets": ["presets/*.yaml", "example/*"], "recon_core": ["weights/*"]},
    data_files=[("share/gadgetron/config", [str(p.relative_to(here)) for p in sorted(here.glob("config_xml/*.xml"))])],
    entry_points={"console_scripts": ["slicediff = gadgets.cli:command"]},
    install_requires=[
        "torch>=2.6,<2.14",  # the solver and the prior; newer CUDA builds are untested
        "numpy>=1.26,<3",
        "ismrmrd>=1.14.2,<1.16",  # acquisitions, images, headers; 1.14.1 and before write broken XML
        "xsdata>=24.5",  # headers, more tolerantly than ismrmrd lets it (which needs it anyway)
        "gadgetron>=1.4.1,<2",  # starts us from <execute>
        "h5py>=3.10",  # block-wise reading of ISMRMRD files (ismrmrd needs it anyway)
        "pyyaml>=6",  # presets
        "pydantic>=2.6,<3",  # validated options with an error for each wrong value
        "safetensors>=0.4.3",  # weights without pickle
        "nibabel>=5.2",  # NIfTI in and out
        "rich>=13",  # progress
        "matplotlib>=3.8",  # the comparison picture, --png
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",  # runs them in two processes, which takes two fifths of the time
            "hypothesis>=6.100",  # the reader against damaged streams
            "prometheus-client>=0.20",
        ],
        "metrics": ["prometheus-client>=0.20"],  # slicediff serve --health-port
        "bench": [
            # the classical denoisers of tests/benchmarks/denoising.py; error_map.py uses the SciPy that comes with it
            "scikit-image>=0.22",
            "PyWavelets>=1.5",  # which scikit-image's wavelet denoiser needs
        ],
    },
)
