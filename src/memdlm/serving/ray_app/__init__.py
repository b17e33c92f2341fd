"""A Ray Serve application: replicas hold engines, and a request goes to one that has its memory. Needs the extra `ray`.

serve run memdlm.serving.ray_app:app model=MODEL memories=URL replicas=2
"""

from memdlm.serving.ray_app.building import app

__all__ = ["app"]
