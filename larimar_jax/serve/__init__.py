"""Memories that are served: one loaded model, many sessions, and an API that clients already speak.

request ─▶ gate.py: who is it, and may they ─▶ completions.py ─▶ batching.py: one decoder pass for all
                                            ─▶ facts.py ─▶ tenants.py: a session each, changed in order
"""
