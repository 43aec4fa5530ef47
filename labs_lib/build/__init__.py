"""From one source per lab to its two notebooks, the index and the report. AUTHORING.md says how a lab is written."""
