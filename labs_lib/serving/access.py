"""Who may ask, and what a name means for them: keys to tenants, model names to immutable versions, paths to folders.

A key leads to one tenant, and only that tenant's own adapters (and the base, if it is offered) exist for it: the name
of another tenant's adapter gets the same 404 `model_not_found` as a name that nobody has, as OpenAI does ("does not
exist or you do not have access to it"). A 403 would tell a stranger that the name is there; and nothing but the
caller's own tenant is ever looked up, so there is no timing to learn from either. 403 is left for what is no secret:
the admin's paths.

Which version a name means is settled when a request arrives, by the registry on disk, so a publish from another
process counts from the next request on, and requests under way keep the version that they began with.
"""

import asyncio
import hmac
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from labs_lib.serving.web import ApiError


async def in_thread(function, *arguments, pool: Executor | None = None):
    """Run what may wait for a disk, a lock or a long text beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


@dataclass(frozen=True)
class Target:
    """What a model name meant when the request came: one immutable version, or the base."""

    adapter: str | None = None
    version: int | None = None


class Access:
    """Reads the registry; keeps nothing of it.

    Args:
        registry: keys, tenants, versions.
        admin_key: opens the admin's paths; None leaves them shut.
        model_name: what the base is called here.
        allow_base: whether tenants may use the base itself.
        adapter_root: the only directory from which an admin may publish over HTTP; None is nowhere.
    """

    def __init__(
        self, registry, *, admin_key: str | None, model_name: str, allow_base: bool, adapter_root: Path | None
    ) -> None:
        self.registry, self.model_name, self.allow_base = registry, model_name, allow_base
        self.adapter_root = None if adapter_root is None else Path(adapter_root).resolve()
        self._admin_key = None if not admin_key else admin_key.encode()

    async def tenant(self, key: str | None) -> str:
        """The name of the tenant whose key this is; 401 if there is none."""
        if key is None:
            raise _unauthorized("You did not provide an API key: send it as `Authorization: Bearer KEY`.")
        found = await in_thread(self.registry.authenticate, key)
        if found is None:
            raise _unauthorized("Incorrect API key provided.")
        return found.name

    def admin(self, key: str | None) -> None:
        """401 without a key, 403 with any but the admin's."""
        if key is None:
            raise _unauthorized("You did not provide the admin key: send it as `Authorization: Bearer KEY`.")
        # Bytes, since compare_digest takes no text beyond ASCII.
        if self._admin_key is None or not hmac.compare_digest(key.encode(), self._admin_key):
            raise ApiError(403, "Only the admin key may do this.", kind="permission_error", code="admin_only")

    async def target(self, tenant: str, name: str | None) -> Target:
        """What a model name (None: the base) means for this tenant, now.

        Its own name comes first: a tenant that is called like the base never gets the base by accident.
        """
        own, _, number = (name or "").partition(":")
        if own == tenant:
            version = await self._version(tenant, number)
            if version is not None:
                return Target(version.sha256, version.number)
        elif self.allow_base and name in (None, self.model_name):
            return Target()
        raise self.unknown(name or self.model_name)

    @staticmethod
    def unknown(name: str) -> ApiError:
        """The one answer for a name that is nobody's, another's, or not published."""
        message = f"The model {name[:100]!r} does not exist or you do not have access to it."
        return ApiError(404, message, code="model_not_found", param="model")

    async def _version(self, tenant: str, number: str):
        if not number:
            return await in_thread(self.registry.current, tenant)
        return next((each for each in await self.versions(tenant) if str(each.number) == number), None)

    async def versions(self, tenant: str) -> list:
        """Those that can be asked for by number."""
        return [each for each in await in_thread(self.registry.versions, tenant) if each.state != "retired"]

    async def models(self, tenant: str) -> list[tuple[str, object]]:
        """(name, version or None for the base) of all that exists for this tenant."""
        current = await in_thread(self.registry.current, tenant)
        named = [(self.model_name, None)] if self.allow_base else []
        named += [(tenant, current)] if current else []
        return named + [(f"{tenant}:{each.number}", each) for each in await self.versions(tenant)]

    def folder(self, path: str) -> Path:
        """A folder below the adapter root, links followed. What lies outside is refused the same, there or not."""
        if self.adapter_root is None:
            raise ApiError(
                403,
                "This server takes no paths: start it with --adapter-root.",
                kind="permission_error",
                code="no_adapter_root",
            )
        outside = ApiError(
            400, "lora_path is not an adapter folder below the server's adapter root.", param="lora_path"
        )
        try:
            folder = (self.adapter_root / path).resolve(strict=True)
            files = [file.resolve(strict=True) for file in folder.iterdir()]
        except (OSError, ValueError, RuntimeError):  # absent, a null byte, a loop of links
            raise outside from None
        if not all(each.is_relative_to(self.adapter_root) for each in (folder, *files)):
            raise outside
        return folder


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
