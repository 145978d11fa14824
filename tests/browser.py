"""A browser and a JupyterLab for tests; who has no chromium skips them."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT = 180_000  # ms that a page may take, on a machine that is busy


def chromium():
    """Where chromium is: CHROMIUM, or on the path; skips the test where it is not."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip("no chromium: install it, or set CHROMIUM to its path")
    return path


@contextmanager
def opened_browser():
    """A chromium without a window, driven by playwright."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=WAIT
        )
        yield browser
        browser.close()


@contextmanager
def jupyterlab(folder):
    """JupyterLab over a folder, with settings of its own: its address, as a format of a path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, own = secrets.token_hex(8), folder / ".jupyter"
    options = {
        "ServerApp": {"port": port, "ip": "127.0.0.1", "root_dir": folder, "allow_root": True},
        "IdentityProvider": {"token": token},
    }
    flags = [f"--{app}.{k}={v}" for app, values in options.items() for k, v in values.items()]
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")
    places = {name: str(own / name.lower()) for name in (*names, "JUPYTERLAB_WORKSPACES_DIR")}
    settings = own / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    asks_nothing = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(asks_nothing))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", *flags]
    with open(folder / "jupyterlab.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | places, stdout=log, stderr=log
        )
    try:
        base = f"http://127.0.0.1:{port}"
        _wait_for(f"{base}/api?token={token}", server, folder / "jupyterlab.log")
        yield f"{base}/lab/tree/{{}}?token={token}"
    finally:
        server.send_signal(signal.SIGTERM)  # ends its kernels, too
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(address, server, log):
    for _ in range(240):
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-2000:])
