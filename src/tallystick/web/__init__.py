"""Pages and JSON for a FastAPI app: paywall, purchase, onboarding; and the operator's console."""
