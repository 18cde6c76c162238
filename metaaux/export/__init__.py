"""Renderings as files: pictures, sheets, videos, meshes."""
