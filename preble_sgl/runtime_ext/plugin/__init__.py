"""The plugin that SGLang loads into its processes, and what the launcher has to know of it."""

import os


def load() -> None:
    """Install the plugin in a server that our launcher started; leave every other one as it is."""
    from preble_sgl.runtime_ext.plugin.settings import from_environment

    settings = from_environment(os.environ)
    if settings is not None:
        from preble_sgl.runtime_ext.plugin.hooks import install

        install(settings)
